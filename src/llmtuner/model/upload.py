"""Upload of a folder to the hub; private unless the user says otherwise."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llmtuner.extras.errors import StorageError


def upload_folder(
    folder: Path,
    name: str,
    *,
    token: str | None,
    private: bool = True,
    left_out: Sequence[str] = (),
    where: str,
) -> str:
    """Upload a folder as a model repository and return its address.

    Args:
        folder: what to upload.
        name: `owner/name` or `name` of the repository; it is made if need be.
        token: login token; None: the one that the hub's own tool has saved.
        private: only the owner sees a repository that is made.
        left_out: patterns of files to leave out.
        where: the option that asked for it, for messages.

    Raises:
        StorageError: the hub cannot be reached or refuses; the folder on disk is whole.
    """
    api = HfApi(token=token)
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, ignore_patterns=list(left_out)
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise StorageError(
            f"The result is saved, but the upload failed: {reason}",
            where=f"--{where} {name}",
            fix=f"upload the folder {folder} when the hub can be reached",
        ) from error
    return str(repository)
