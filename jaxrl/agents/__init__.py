"""The methods, one file each, and the one table that names them."""

from jaxrl.agents.bc import BC
from jaxrl.agents.fmq import FMQ

AGENTS: dict[str, type] = {"bc": BC, "fmq": FMQ}
"""Every agent by the name that the command line knows it by."""
