"""Prove over all rows that what is trained is what is served."""

import json
from collections.abc import Sequence

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Verify every row of every data set, and say what was proved.

    Raises:
        TemplateError: for some row, training and serving would not agree.
    """
    config = parse_or_help("data verify", argv)
    if config is None:
        return 0
    from llmtuner.data.encoders import ENCODERS
    from llmtuner.data.verify import verify_datasets
    from llmtuner.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model, without_model=True)
    encode = ENCODERS.get(config.finetuning.stage)(config.data, tokenizer)
    if encode.template is None:
        raise ConfigError(
            "Plain texts have no prompt, so there is nothing to prove.",
            where="--stage",
            got=config.finetuning.stage,
            fix="use --stage sft, or llmtuner data audit",
        )
    contract = verify_datasets(
        config.data, encode, trust_remote_code=config.model.trust_remote_code
    )
    if config.showing.json:
        print(json.dumps(contract.to_dict(), ensure_ascii=False))
    else:
        for name, verified in contract.datasets.items():
            print(f"{name}: {verified.rows} rows, {verified.turns} trained answers proved.")
            if verified.bad_rows:
                print(f"  {verified.bad_rows} rows are unusable.")
            if verified.unprovable:
                print(f"  {verified.unprovable} answers follow prompts that truncation damaged.")
        stops = ", ".join(f"{token!r} ({number})" for token, number in contract.stop_tokens.items())
        print(f"Serving stops on {stops}.")
        print(f"Contract {contract.digest[:16]}: tokenizer, chat template and stop ids as saved.")
    contract.check()
    return 0
