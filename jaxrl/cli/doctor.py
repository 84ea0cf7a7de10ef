"""The installation checks of `jaxrl doctor`."""

import importlib.metadata
import shutil

import jax
import jax.numpy as jnp

from jaxrl.system import PACKAGES, jax_setting

OPTIONAL = ("h5py", "ogbench", "playground", "wandb")


def installation() -> list[str]:
    """Returns one line per check of versions, devices and numerics; lines of failed checks begin with FAIL."""
    lines = []
    for name in (*PACKAGES, *OPTIONAL):
        try:
            lines.append(f"ok    {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{'--' if name in OPTIONAL else 'FAIL':<5} {name} is not installed")
    if jax.__version_info__ < (0, 10):
        lines.append(f"FAIL  jax {jax.__version__} is older than 0.10")
    for device in jax.devices():
        lines.append(f"ok    device {device.id}: {device.device_kind} ({device.platform})")
    if shutil.which("nvidia-smi") and jax.default_backend() == "cpu":
        lines.append("FAIL  a GPU is present but JAX does not use it: pip install 'jaxrl[cuda13]' (or cuda12)")
    total = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
    lines.append("ok    a compiled program gives the right number" if total == 64.0**3 else "FAIL  wrong arithmetic")
    lines.append(f"ok    compiled programs are kept in {jax_setting('compilation_cache_dir')}")
    lines.append(f"--    matmul precision {jax_setting('default_matmul_precision') or 'default'} (TF32 on recent GPUs)")
    if jax_setting("enable_x64"):
        lines.append("FAIL  JAX_ENABLE_X64 is on: runs compute with 32-bit numbers, unset it")
    return lines
