"""Uploads a finished export of format `datasets` to the Hugging Face hub, or a hub of the same interface.

In: a folder that is whole, a repository's name. Out: the address of the repository, which holds the folder's files as
one commit; what stands there already is not sent again. The token comes from the environment (HF_TOKEN, or what `hf
auth login` left) and the hub's address too (HF_ENDPOINT): neither is ever in a recipe. RetryableError when the hub
does not answer, RecipeError when it refuses; the folder stands either way, and the same command tries again.
"""

from __future__ import annotations

from pathlib import Path

from mmdata.errors import MissingExtra, RecipeError, RetryableError
from mmdata.publish import MANIFEST

__all__ = ["push"]


def push(folder: Path, repository: str) -> str:
    """Make the dataset repository (private, when it is not there) and upload `folder`; returns its address."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    except ImportError:
        raise MissingExtra("push_to_hub needs huggingface_hub: pip install huggingface_hub") from None
    api = HfApi()
    try:
        found = api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            ignore_patterns=[MANIFEST],
            commit_message="mmdata export",
        )
    except LocalTokenNotFoundError:
        raise RecipeError("push_to_hub: there is no token; set HF_TOKEN to one that may write there") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 429 or status >= 500 or not status:
            raise RetryableError(f"the hub answered {status} for {repository}; give the same command again") from None
        raise RecipeError(
            f"push_to_hub: the hub refused {repository} with status {status}; set HF_TOKEN to one that may write there"
        ) from None
    except Exception as error:  # noqa: BLE001  the client lets through whatever its HTTP library raises
        raise RetryableError(f"the hub does not answer ({type(error).__name__}); give the same command again") from None
    return str(found)
