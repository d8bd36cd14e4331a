"""Your own decoder layer, named by import path (``--decoder-layer package.module:function``); docs/own_layer.md."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_steel.config.schema import ModelConfig

LayerFunction = Callable[[ModelConfig, BackendSpecProvider, int], ModuleSpec]


def load_layer_function(path: str) -> LayerFunction:
    """The function behind ``package.module:function``: (sizes, backend's modules, number of the layer) -> its spec.

    Raises ``ValueError`` when the path leads to no function, or the function to no specification.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"--decoder-layer {path}: write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--decoder-layer {path}: cannot import {module_name} ({error}); see PYTHONPATH") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--decoder-layer {path}: {module_name} has no function {name}")

    def checked(size: ModelConfig, provider: BackendSpecProvider, layer: int) -> ModuleSpec:
        spec = function(size, provider, layer)
        if not isinstance(spec, ModuleSpec):
            raise ValueError(f"--decoder-layer {path}: returned {type(spec).__name__}, must return a ModuleSpec")
        return spec

    return checked
