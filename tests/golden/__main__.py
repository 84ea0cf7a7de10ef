"""`python -m tests.golden [DIR]`: one line per recorded file, then a count. Exit code 1 where a file fails."""

import argparse
import sys
from pathlib import Path

import jax

from tests import golden

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # each program runs a few times only


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=golden.__doc__)
    parser.add_argument("dir", nargs="?", type=Path, default=Path(__file__).parent, help="folder of .npz files")
    folder = parser.parse_args().dir
    files = sorted(folder.glob("*.npz"))
    if not files:
        print(f"golden: no .npz file in {folder}", file=sys.stderr)
        return 2
    outcomes = []
    for file in files:
        outcomes.append(golden.replay(file))
        print(outcomes[-1], flush=True)
    passed = sum(outcome.passed for outcome in outcomes)
    unknown = sum(not outcome.known for outcome in outcomes)
    failed = len(outcomes) - passed - unknown
    print(f"golden: {passed} passed, {failed} failed, {unknown} unknown")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
