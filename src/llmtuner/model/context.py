"""How many tokens a model can look at together."""

from transformers import PreTrainedConfig

_LIMIT = "max_position_embeddings"


def context_tokens(config: PreTrainedConfig) -> int | None:
    """Return the longest prompt and answer together; None where the configuration has no limit."""
    text = config.get_text_config()
    limit = text.to_dict().get(text.attribute_map.get(_LIMIT, _LIMIT))
    return limit if isinstance(limit, int) and limit > 0 else None
