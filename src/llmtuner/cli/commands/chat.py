"""Talk to a model in the terminal, with or without adapters."""

from collections.abc import Sequence

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.libraries import loading_libraries

_HELP = "Type a question; `clear` forgets the conversation, `quit` or `exit` ends."


def run(argv: Sequence[str]) -> int:
    """Load the model, then answer until the user leaves; the model's own words go to stdout."""
    config = parse_or_help("chat", argv)
    if config is None:
        return 0
    with loading_libraries():
        from llmtuner.data.conversation import Message
        from llmtuner.inference.engine import load_engine

    engine = load_engine(config.model, config.data, config.generating)
    print(_HELP)
    history: list[Message] = []
    while (question := _ask()) is not None:
        if question == "clear":
            history.clear()
        elif question:
            history.append(Message("user", question))
            (answer,) = engine.answer([history])
            history.append(Message("assistant", answer))
            print(f"Assistant: {answer}")
    return 0


def _ask() -> str | None:
    """Return the next line, or None when the user leaves."""
    try:
        line = input("User: ").strip()
    except EOFError:
        return None
    return None if line in ("quit", "exit") else line
