"""Everything an operator may set: flags, variables `SQUEEZED_...`, and a TOML file, in that order.

Defaults stand here alone; the command line is made from this class.
"""

from __future__ import annotations

import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from squeezed.config import BEST, DEFAULT_BUDGET
from squeezed.errors import SqueezedError, shown
from squeezed.hf.loading import DEMO_MODEL
from squeezed.system.failures import cause_of

GIB, MIB = 1 << 30, 1 << 20


class ServerSettings(BaseSettings):
    """Settings of `squeezed serve`."""

    model_config = SettingsConfigDict(
        env_prefix="SQUEEZED_", extra="forbid", frozen=True, allow_inf_nan=False
    )

    model: str = Field(DEMO_MODEL, description="Directory, .gguf file, hub name, or demo.")
    served_name: str = Field("", description="What clients call the model; by default its name.")
    contexts: Path = Field(Path("contexts"), description="Directory of saved contexts.")
    host: str = Field("127.0.0.1", description="Address; all but loopback need an API key file.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    api_key_file: Path | None = Field(None, description="File of keys, one a line.")
    engine: Literal["local", "vllm"] = Field("local", description="local or vllm.")
    budget: float = Field(DEFAULT_BUDGET, gt=0, le=1, description="Share of keys read; 1 is dense.")
    preset: str = Field(BEST.name, description="best or paper.")
    implementation: str = Field("auto", description="auto, reference, cpu or triton.")
    dtype: str = Field("auto", description="auto, bfloat16, float16 or float32.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    context_memory: float = Field(
        0, ge=0, description="GiB for contexts in memory; 0 is half of what is free."
    )
    answer_tokens: int = Field(512, ge=1, description="Longest answer unless a request says.")
    max_answer_tokens: int = Field(4096, ge=1, description="Longest answer that may be asked for.")
    max_prompt_tokens: int = Field(
        16384, ge=1, description="Longest prompt, without its context's tokens."
    )
    max_document_tokens: int = Field(1_000_000, ge=1, description="Longest document.")
    max_body_mb: int = Field(64, ge=1, le=4096, description="Largest request, in MiB.")
    rows: int = Field(32, ge=1, le=1024, description="Answers written together over one context.")
    queue: int = Field(256, ge=1, description="Requests that may wait; more are refused.")
    jobs: int = Field(16, ge=1, description="Documents that may wait to be indexed.")
    requests_per_key: int = Field(64, ge=1, description="Requests of one key at the same time.")
    parse_seconds: int = Field(60, ge=1, description="Longest time to read an uploaded file.")
    parse_memory_mb: int = Field(2048, ge=256, description="Memory to read an uploaded file, MiB.")
    body_seconds: int = Field(
        60, ge=1, description="Longest time for a client to send a request, or to take a piece."
    )
    grace_seconds: float = Field(30, ge=0, description="Time for answers to end at SIGTERM.")
    keep_control_tokens: bool = Field(
        False, description="Let control tokens in documents and prompts count as such."
    )

    @model_validator(mode="after")
    def _guarded(self) -> ServerSettings:
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} can be reached by others; give --api-key-file, or keep "
                "127.0.0.1"
            )
        return self

    @classmethod
    def of(cls, given: dict[str, Any], file: Path | None = None) -> ServerSettings:
        """From flags, then variables, then a TOML file, then defaults.

        Raises:
            SqueezedError: an unknown name, a value that cannot be, or a file that cannot be read.
        """
        chosen = _with_file(cls, file)
        try:
            return chosen(**given)
        except ValidationError as error:
            raise SqueezedError(_first(error)) from error

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_name or self.model

    @property
    def max_body_bytes(self) -> int:
        return self.max_body_mb * MIB


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _with_file(cls: type[ServerSettings], file: Path | None) -> type[ServerSettings]:
    if file is None:
        return cls
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SqueezedError(
            f"config: {shown(file)} cannot be read ({cause_of(error)}); name a TOML file"
        ) from error

    class WithFile(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file)

    return WithFile


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    name = "-".join(map(str, found["loc"])).replace("_", "-")
    said = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        return f"config: no setting is called {shown(name)}; see squeezed serve --help"
    return f"{name}: {said}, got {shown(found['input'])}" if name else said
