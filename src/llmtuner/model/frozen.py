"""Which layers nothing below or inside learns: no gradient has to reach them."""

from torch import nn
from transformers import PreTrainedModel

from llmtuner.model.methods.freeze import transformer_layers


def frozen_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers below the lowest one that learns, from the lowest; [] where there are none.

    Args:
        model: without the wrapper of adapters, which are inside.
    """
    if not any(isinstance(module, nn.ModuleList) for module in model.modules()):
        return []
    layers = transformer_layers(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    found: list[nn.Module] = []
    for parameter in model.parameters():
        if id(parameter) in inside:  # what is registered after the layers computes after them
            break
        if parameter.requires_grad:  # an embedding, or a head that is tied to it
            return []
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            break
        found.append(layer)
    return found
