"""Upload of a finished run; private unless the user says otherwise."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llmtuner.extras.errors import StorageError
from llmtuner.hparams.training import TrainArgs

# Other folders of a run are for going on with it here, not for using the result.
_KEPT_AT_HOME = ["checkpoint-*", ".staging-*", "logs/*", "merged/*", "*.lock"]


def push_result(output_dir: Path, train: TrainArgs) -> str:
    """Upload the result of a run and return its address.

    Raises:
        StorageError: the hub cannot be reached or refuses; the result on disk is whole.
    """
    api = HfApi(token=train.hub_token)
    name = train.hub_model_id or output_dir.name
    private = train.other.get("hub_private_repo")
    try:
        repository = api.create_repo(
            name, private=True if private is None else bool(private), exist_ok=True
        )
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=output_dir, ignore_patterns=_KEPT_AT_HOME
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise StorageError(
            f"Trained and saved, but the upload failed: {reason}",
            where=f"--hub_model_id {name}",
            fix=f"upload the folder {output_dir} when the hub can be reached",
        ) from error
    return str(repository)
