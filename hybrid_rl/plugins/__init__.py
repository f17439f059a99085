"""Users' functions (rewards, environments) in processes of their own, which may hang, crash or raise.

`resolve` finds what a name means, `processes` is the side that calls, by way of `nursery`, `watch` and `lines`,
`worker` the side that is called, and `tree` ends processes with all they started. Nothing of a plugin is ever loaded in
the calling process, and nothing that it sends back is unpickled there.
"""

from hybrid_rl.plugins.processes import Answer, Failure, PluginProcesses, late
from hybrid_rl.plugins.resolve import absolute, call, load_plugin, missing

__all__ = ["Answer", "Failure", "PluginProcesses", "absolute", "call", "late", "load_plugin", "missing"]
