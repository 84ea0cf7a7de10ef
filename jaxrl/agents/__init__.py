"""The methods, one file each, and the one table that names them."""

from jaxrl.agents.bc import BC
from jaxrl.agents.dqc import DQC
from jaxrl.agents.fmq import FMQ
from jaxrl.agents.fql import FQL
from jaxrl.agents.iql import IQL
from jaxrl.agents.qc import QC
from jaxrl.agents.qgf import QGF

AGENTS: dict[str, type] = {"bc": BC, "fmq": FMQ, "iql": IQL, "qgf": QGF, "fql": FQL, "qc": QC, "dqc": DQC}
"""Every agent by the name that the command line knows it by."""
