"""ComfyUI's door. It imports this folder under the name of its path, so that nothing in it can be imported by name unless we see to it.

`promptloop_pipeline` is taken from beside this file, so that nodes and package are always of one version; where the folder comes
without it, the installed one is used.
"""

import importlib.util
import sys
from pathlib import Path

_PACKAGE = "promptloop_pipeline"
_beside = Path(__file__).parent / _PACKAGE / "__init__.py"

if importlib.util.find_spec("comfy_api"):  # only ComfyUI has it; linters and test runners may import this file too
    if _beside.is_file():
        _spec = importlib.util.spec_from_file_location(_PACKAGE, _beside, submodule_search_locations=[str(_beside.parent)])
        _module = importlib.util.module_from_spec(_spec)
        for _name in [n for n in sys.modules if n == _PACKAGE or n.startswith(_PACKAGE + ".")]:
            del sys.modules[_name]  # an installed one that somebody has imported already
        sys.modules[_PACKAGE] = _module
        _spec.loader.exec_module(_module)
    elif not importlib.util.find_spec(_PACKAGE):
        raise ImportError(f"PromptLoop: {_PACKAGE} is neither in {_beside.parent.parent} nor installed; pip install promptloop")

    from .comfy_nodes import comfy_entrypoint

    WEB_DIRECTORY = "./comfy_nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
