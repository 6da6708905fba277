"""Work on torch.fx graphs: tracing diffusion models and giving them the timestep as an input."""

from tdq_plugin.graph.module_path import copy_module_paths
from tdq_plugin.graph.timestep_node import find_timestep_node
from tdq_plugin.graph.trace import trace

__all__ = ["copy_module_paths", "find_timestep_node", "trace"]
