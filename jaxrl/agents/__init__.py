"""The methods, one file each, and the one table that names them."""

from jaxrl.agents.a2pr import A2PR
from jaxrl.agents.awac import AWAC
from jaxrl.agents.bc import BC
from jaxrl.agents.cfpi import CFPI
from jaxrl.agents.cql import CQL
from jaxrl.agents.dqc import DQC
from jaxrl.agents.famo2o import FamO2O
from jaxrl.agents.fmq import FMQ
from jaxrl.agents.fql import FQL
from jaxrl.agents.iql import IQL
from jaxrl.agents.odice import ODICE
from jaxrl.agents.prdc import PRDC
from jaxrl.agents.qc import QC
from jaxrl.agents.qgf import QGF
from jaxrl.agents.rebrac import ReBRAC
from jaxrl.agents.td3bc import TD3BC

AGENTS: dict[str, type] = {
    "bc": BC,
    "fmq": FMQ,
    "iql": IQL,
    "qgf": QGF,
    "fql": FQL,
    "qc": QC,
    "dqc": DQC,
    "td3bc": TD3BC,
    "rebrac": ReBRAC,
    "prdc": PRDC,
    "a2pr": A2PR,
    "cql": CQL,
    "awac": AWAC,
    "odice": ODICE,
    "famo2o": FamO2O,
    "cfpi": CFPI,
}
"""Every agent by the name that the command line knows it by."""
