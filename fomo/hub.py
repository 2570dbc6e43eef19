"""Models on the Hugging Face hub, where open_clip's and those of transformers lie in repositories ORG/NAME."""

from pathlib import Path

SMALL = ("*.json", "*.txt", "*.model")  # configuration and tokenizer
WEIGHTS = (  # the first kind that there is
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)


def config_file(repository: str) -> Path:
    """open_clip_config.json, else the config.json of transformers, with all but the weights beside it."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "open_clip_config.json"))
    except EntryNotFoundError:  # or there is no network, and perhaps the rest is here
        found = Path(snapshot_download(repository, allow_patterns=list(SMALL)), "config.json")
    if not found.exists():
        raise FileNotFoundError(f"{repository} has neither open_clip_config.json nor config.json")
    return found


def with_weights(repository: str) -> Path:
    """The folder of a model of transformers."""
    from huggingface_hub import snapshot_download

    for kind in WEIGHTS:
        folder = Path(snapshot_download(repository, allow_patterns=[*SMALL, *kind]))
        if any(any(folder.glob(pattern)) for pattern in kind):
            break
    return folder
