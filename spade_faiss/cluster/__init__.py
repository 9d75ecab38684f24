"""One gallery over many: members side by side, searched as one, in this process or on the machines of a Ray cluster."""

from .cluster import Cluster
from .federation import Federation
from .membership import MemberOptions
from .ray_build import RayMachines

__all__ = ["Cluster", "Federation", "MemberOptions", "RayMachines"]
