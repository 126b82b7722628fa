"""The prompts on which an exported model is compared with what it was made from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.prompt import encode, prompt_ids
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.data.template import Template, load_template
from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs

_LONGEST_TOKENS = 512  # of a prompt; the comparison looks at its end
_BUILT_IN = (
    "What helps against a cold?",
    "感冒了应该吃什么药？",
    "Write one sentence about the sea.",
    "你是谁？",
    "List three uses of a pencil.",
    "把“早睡早起”翻译成英文。",
    "def add(a, b):",
    "请用一句话介绍人参。",
)


@dataclass(frozen=True)
class ProbePrompt:
    """One prompt: a chat, or plain text where there is no chat template."""

    conversation: Conversation

    def ids(self, tokenizer: PreTrainedTokenizerBase, template: Template | None) -> list[int]:
        """Return what the model reads, the last tokens of it if it is long."""
        messages = self.conversation.messages
        if template is None or messages[0].role == "text":
            ids = encode(messages[-1].content, tokenizer)
        else:
            ids = prompt_ids(
                messages, template=template, tokenizer=tokenizer, tools=self.conversation.tools
            )
        return ids[-_LONGEST_TOKENS:]


def load_probe_prompts(data: DataArgs, count: int) -> list[ProbePrompt]:
    """Return the first rows of the user's data sets, or the built-in prompts without any.

    Each ends with the question before the first answer.
    """
    if data.dataset is None:
        texts = _BUILT_IN[:count]
        return [ProbePrompt(Conversation((Message("user", text),))) for text in texts]
    return [ProbePrompt(row) for row in islice(_questions(data), count)]


def load_chat_template(data: DataArgs, tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """Load the template that the user named, else the tokenizer's own; None if it has none."""
    if data.template is None and not tokenizer.chat_template:
        return None
    return load_template(
        data.template,
        tokenizer,
        default_system=data.default_system,
        enable_thinking=data.enable_thinking,
    )


def _questions(data: DataArgs) -> Iterator[Conversation]:
    found = False
    for spec in load_dataset_specs(data, data.dataset or ()):
        bad_rows = BadRows(data.on_bad_row)
        for row in load_conversations(spec, data_args=data, bad_rows=bad_rows):
            question = _until_answer(row.messages)
            if question:
                found = True
                yield replace(row, messages=question)
    if not found:
        raise DataError("No row has a question to compare the models on.", got=data.dataset)


def _until_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    if messages[0].role == "text":
        return tuple(messages)
    roles = [message.role for message in messages]
    end = roles.index("assistant") if "assistant" in roles else len(roles)
    return tuple(messages[:end])
