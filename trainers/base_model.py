"""The base model as far as it is read before a worker starts: its shape, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_rl.config import Config, ConfigError


def meta_model(config: Config) -> Any:
    """The model without its weights, which are not read. Raises `ConfigError` where there is none."""
    _check_there(config)
    try:
        model_config = AutoConfig.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a path that is not a model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.path={config.model.path!r} is not a causal language model: {reason}") from None
    return model


def check_weights(config: Config) -> None:
    """Refuse a directory without weights."""
    local = Path(config.model.path)
    if local.is_dir() and not any(local.glob("*.safetensors")):
        raise ConfigError(f"model.path={config.model.path!r} has no weights (*.safetensors)")


def _check_there(config: Config) -> None:
    """Refuse a model that is neither on disk nor to be fetched, before transformers looks for each of its files: it
    asks a hub that does not answer for half a minute a file."""
    path = config.model.path
    if Path(path).exists():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"model.path={path!r} has no config.json: it is not a model's directory")
        return
    if config.warm_start is not None:
        raise ConfigError(f"model.path={path!r} does not exist yet; make it with `hybrid-rl warm-start` and this file")
    try:
        if not isinstance(try_to_load_from_cache(path, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(path, "config.json"))
    except HFValidationError:
        raise ConfigError(f"model.path={path!r} is no directory that exists, and no name of a hub's model") from None
    except OfflineModeIsEnabled:
        raise ConfigError(
            f"model.path={path!r} cannot be fetched: HF_HUB_OFFLINE is set, and it is not on this machine; give a "
            "directory, or unset that"
        ) from None
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise ConfigError(
            f"model.path={path!r} cannot be fetched: no hub can be reached; give a directory, or set HF_ENDPOINT "
            "(`hybrid-rl doctor` looks at the hub)"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError):  # a hub is there, and transformers says what it answers
        return
