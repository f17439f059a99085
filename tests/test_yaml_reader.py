"""Secrets among settings: keys and tokens as they look, and ordinary values that resemble them."""

from __future__ import annotations

import string
from typing import Any

import pytest

from hybrid_rl.config import ConfigError
from hybrid_rl.yaml_reader import refuse_secrets

LETTERS = string.ascii_letters + string.digits
"""What tokens are made of; none here is anybody's."""
GITHUB = f"ghp_{LETTERS[-36:]}"


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"path": f"https://{GITHUB}@github.com/a/model"}},
        {"model": {"path": f"https://{LETTERS[-52:]}@dev.azure.com/a/model"}},
        {"model": {"path": "https://me:hunter2@host/model"}},
        {"data": {"train": f"https://host/rows.jsonl?sv=2024&sig={LETTERS}"}},
        {"arguments": {"words": ["-v", f"--api-key=sk-{LETTERS[:48]}"]}},
        {"arguments": {"words": ["--hub-token=hunter2"]}},
        {"arguments": {"command": "serve --password hunter2"}},
        {"arguments": {"hf_token": LETTERS[:20]}},
        {"arguments": {"token": f"{LETTERS[:8]}{LETTERS[-16:]}"}},
        {"arguments": {"password": ["hunter2"]}},
        *(
            {"arguments": {"words": secret}}
            for secret in (
                f"hf_{LETTERS[:34]}",
                f"sk-proj-{LETTERS[:40]}-{LETTERS[:40]}",
                f"sk-ant-api03-{LETTERS[:40]}",
                f"use {GITHUB} here",
                f"github_pat_{LETTERS[:22]}_{LETTERS[:59]}",
                f"glpat-{LETTERS[:20]}",
                f"xoxb-123456789012-123456789012-{LETTERS[:24]}",
                f"AKIA{string.ascii_uppercase[:16]}",
                f"Authorization: Bearer {LETTERS[:40]}",
                f"eyJ{LETTERS[:20]}.eyJ{LETTERS[:40]}.{LETTERS}",
                "-----BEGIN OPENSSH PRIVATE KEY-----",
            )
        ),
    ],
)
def test_secrets_are_refused_and_not_shown(tree: dict[str, Any]):
    with pytest.raises(ConfigError, match="holds a") as caught:
        refuse_secrets(tree)
    assert not any(part in str(caught.value) for part in ("hunter2", LETTERS[:16], LETTERS[-16:], GITHUB[4:]))


@pytest.mark.parametrize(
    "value",
    [
        "hf_checkpoints_v2/qwen",
        "hf_math500_train.jsonl",
        "sk-learn-models-dir/x",
        "risk-averse20260101baseline",
        "models/task-abcdefghijklmnopqrstuvwxyz",
        "AKIAlphabet/model_0001",
        "abfss://a-container-of-runs-2026@account.dfs.core.windows.net/run",
        "ssh://git@github.com/a/b",
        "https://a-research-laboratory@dev.azure.com/a/b",
        "--api-key=$OPENAI_API_KEY",
        "The bearer of this is internationalised.",
    ],
)
def test_what_only_resembles_one_is_let_through(value: str):
    refuse_secrets({"model": {"path": value}, "arguments": [value]})


def test_keys_and_tokens_that_are_none():
    refuse_secrets(
        {"arguments": {"key": "solution_field_1234", "eos_token": "<|end_of_sentence|>", "api_key_env": "A"}}
    )
