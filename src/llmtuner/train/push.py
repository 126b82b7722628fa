"""Upload of a finished run; private unless the user says otherwise."""

from pathlib import Path

from llmtuner.hparams.training import TrainArgs
from llmtuner.model.upload import upload_folder

# Other folders of a run are for going on with it here, not for using the result.
_KEPT_AT_HOME = ("checkpoint-*", ".staging-*", "logs/*", "merged/*", "*.lock")


def push_result(output_dir: Path, train: TrainArgs) -> str:
    """Upload the result of a run and return its address.

    Raises:
        StorageError: the hub cannot be reached or refuses; the result on disk is whole.
    """
    private = train.other.get("hub_private_repo")
    return upload_folder(
        output_dir,
        train.hub_model_id or output_dir.name,
        token=train.hub_token,
        private=True if private is None else bool(private),
        left_out=_KEPT_AT_HOME,
        where="hub_model_id",
    )
