"""The agents, one file each, and their table by name. README.md is their catalog."""

# ruff: noqa: F401
from jaxrl.agents.a2pr import A2PR
from jaxrl.agents.awac import AWAC
from jaxrl.agents.bc import BC
from jaxrl.agents.cfpi import CFPI
from jaxrl.agents.cql import CQL
from jaxrl.agents.dqc import DQC
from jaxrl.agents.edp import EDP
from jaxrl.agents.famo2o import FamO2O
from jaxrl.agents.fmq import FMQ
from jaxrl.agents.fql import FQL
from jaxrl.agents.iql import IQL
from jaxrl.agents.odice import ODICE
from jaxrl.agents.prdc import PRDC
from jaxrl.agents.qc import QC
from jaxrl.agents.qgf import QGF
from jaxrl.agents.rebrac import ReBRAC
from jaxrl.agents.td3 import TD3
from jaxrl.agents.td3bc import TD3BC

AGENTS: dict[str, type] = {kind.__name__.lower(): kind for kind in list(globals().values()) if isinstance(kind, type)}
"""Every class imported above by its command-line name: the class name in lowercase."""
