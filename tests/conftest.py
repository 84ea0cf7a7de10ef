"""Settings of every test: JAX on the CPU, nothing cached on disk, implicit rank promotion an error, shapes checked."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A program found on disk is not compiled, so a test that counts compilations would count too few.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jaxtyping
import pytest

ROOT = Path(__file__).parents[1]
SHAPED = [path for path in sorted((ROOT / "jaxrl").rglob("*.py")) if "from jaxtyping import" in path.read_text()]
jaxtyping.install_import_hook(
    [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHAPED], "beartype.beartype"
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Sets the rule before any fixture runs; only tests marked `simulator` may broadcast across ranks."""
    rule = "allow" if item.get_closest_marker("simulator") else "raise"
    jax.config.update("jax_numpy_rank_promotion", rule)


@pytest.fixture(scope="module")
def quick():
    """Compiles without most optimizations, for modules whose programs run once or twice."""
    from tests.known import quick_to_compile  # after the import hook

    with quick_to_compile():
        yield


MAPS = Path("/proc/self/maps")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs between modules when there are many: each maps memory, and Linux limits the maps."""
    between = nextitem is None or nextitem.path != item.path
    if between and MAPS.exists() and MAPS.read_text().count("\n") > 20_000:
        jax.clear_caches()
