"""From questions to token ids: the examples, the question, and the letters as they follow it.

The prompt is written by the chat template exactly as for a conversation of that many turns, and a
letter is the token that the template's own rendering of an answer begins with behind that prompt:
never the letter tokenised on its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import Message
from llmtuner.data.prompt import encode, prepare_chat, prompt_ids
from llmtuner.data.spans import prove_turn
from llmtuner.data.template import Template
from llmtuner.eval.benchmark import Benchmark, Language, Question, Subject, Wording
from llmtuner.eval.sources import SubjectQuestions
from llmtuner.extras.errors import EvalError


@dataclass(frozen=True)
class Prompt:
    """What the model reads before it answers a question.

    Attributes:
        subject: of the question.
        question: the question.
        ids: token ids up to the place of the letter.
        letter_ids: the ids of the letters at that place; empty where the answer is generated.
    """

    subject: Subject
    question: Question
    ids: list[int]
    letter_ids: tuple[int, ...] = ()

    @cached_property
    def digest(self) -> str:
        """The sha256 of the ids, in decimal with blanks between."""
        return sha256(" ".join(map(str, self.ids)).encode()).hexdigest()


@dataclass(frozen=True)
class PromptWriter:
    """Writes the prompts of a benchmark for one model.

    Attributes:
        benchmark: gives letters and wording.
        template: renders conversations.
        tokenizer: the one the template was loaded for.
        lang: language that the user asked for; None leaves it to subject and benchmark.
    """

    benchmark: Benchmark
    template: Template
    tokenizer: PreTrainedTokenizerBase
    lang: Language | None = None

    def for_letters(self, found: SubjectQuestions) -> list[Prompt]:
        """Return the prompts of a subject up to the place of the letter.

        Raises:
            EvalError: the tokenizer does not tell the letters apart by one token.
        """
        letters = self.benchmark.letters
        turns = [self._turns(found, question) for question in found.questions]
        # All letters behind the first question say where the letter is and which ids it can have;
        # the other questions are rendered with one of them.
        samples = [self._encode(turns[0], letter) for letter in letters]
        place = _first_difference(samples)
        ids = tuple(sample[place] for sample in samples)
        if len(set(ids)) < len(letters):
            problem = "The tokenizer does not begin every letter with another token here."
            got = dict(zip(letters, self.tokenizer.convert_ids_to_tokens(list(ids)), strict=True))
            fix = "use --scoring generate, or another --template"
            raise EvalError(problem, where=found.questions[0].where, got=got, fix=fix)
        tail = samples[0][place:]
        prompts = [samples[0][:place]]
        for question, asked in zip(found.questions[1:], turns[1:], strict=True):
            sample = self._encode(asked, letters[0])
            if sample[-len(tail) :] != tail:
                problem = "The letter is not the same token behind every question."
                raise EvalError(problem, where=question.where, fix="use --scoring generate")
            prompts.append(sample[: -len(tail)])
        return [
            Prompt(found.subject, question, prompt, ids)
            for question, prompt in zip(found.questions, prompts, strict=True)
        ]

    def for_generation(self, found: SubjectQuestions) -> list[Prompt]:
        """Return the prompts of a subject as serving sends them."""
        return [
            Prompt(
                found.subject,
                question,
                prompt_ids(
                    self._turns(found, question), template=self.template, tokenizer=self.tokenizer
                ),
            )
            for question in found.questions
        ]

    def _encode(self, turns: Sequence[Message], letter: str) -> list[int]:
        """Return the ids of a whole conversation, as the examples in a prompt are tokenised.

        Where no control token parts prompt and answer, as in plain text, a tokenizer may join the
        end of the cue and the letter: such a token is what the examples show, so it is scored.
        """
        messages = [*turns, Message("assistant", letter)]
        chat = prepare_chat(messages, template=self.template, tools=None)
        text = prove_turn(chat, len(turns))
        return encode(text.prompt + text.answer, self.tokenizer)

    def _turns(self, found: SubjectQuestions, question: Question) -> list[Message]:
        wording = self.benchmark.wordings[self.lang or found.subject.lang or self.benchmark.lang]
        opening = wording.opening.format(subject=found.subject.name)
        turns = []
        for shot in found.shots:
            turns.append(Message("user", opening + self._asked(shot, wording)))
            turns.append(Message("assistant", str(shot.answer)))
            opening = ""
        return [*turns, Message("user", opening + self._asked(question, wording))]

    def _asked(self, question: Question, wording: Wording) -> str:
        choices = zip(self.benchmark.letters, question.choices, strict=True)
        lines = "".join(f"\n{letter}. {choice}" for letter, choice in choices)
        return f"{question.text}{lines}{wording.cue}"


def _first_difference(samples: Sequence[Sequence[int]]) -> int:
    """Return the first place where the samples do not all have the same id."""
    for place, ids in enumerate(zip(*samples, strict=False)):
        if len(set(ids)) > 1:
            return place
    raise EvalError("The template renders every answer alike.", fix="use another --template")


def check_lengths(prompts: Sequence[Prompt], *, limit: int | None, num_new_tokens: int = 0) -> None:
    """Refuse prompts that the model cannot read whole.

    Args:
        prompts: of one subject.
        limit: the longest text that the model can read, in tokens; None if it has no limit.
        num_new_tokens: room for the answer.

    Raises:
        EvalError: for the longest of them.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if limit is None or len(longest.ids) + num_new_tokens <= limit:
        return
    room = f" and {num_new_tokens} for the answer" if num_new_tokens else ""
    raise EvalError(
        f"A prompt of {longest.subject.key} is longer than the model's context of {limit} tokens.",
        where=longest.question.where,
        got=f"{len(longest.ids)} tokens{room}",
        fix="use fewer examples with --n_shot, or leave the subject out with --subjects",
    )
