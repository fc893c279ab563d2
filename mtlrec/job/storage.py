"""Section `storage_options`: how object storage is reached. No secret has a place here (docs/storage.md)."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mtlrec.job.section import Section

_SECRET = re.compile(r"key|secret|token|passw|credential|auth", re.IGNORECASE)
_INSTEAD = (
    "a job never holds a secret (it is kept with every run and checkpoint); give it by the environment "
    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), the AWS files (profile names one of theirs) or a role"
)


class StorageSection(Section):
    """What the AWS environment and files do not say. Not part of what a run is: it may change on resume."""

    endpoint_url: str | None = None
    """Of a store other than AWS, as https://host:port; null: AWS_ENDPOINT_URL, else AWS itself."""
    region: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]{1,64}$")
    """Null: AWS_REGION, AWS_DEFAULT_REGION or the profile's."""
    profile: str | None = Field(default=None, pattern=r"^[^\x00-\x1f\[\]]{1,128}$")
    """A section of the AWS files that holds region and credentials; null: AWS_PROFILE, else the default."""
    anonymous: bool = False
    """Sign no request: for public buckets."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Where the bucket's name stands: in the path or in the host's name; auto: as the endpoint suggests."""
    ca_bundle: str | None = None
    """File of certificates that the endpoint's is checked by; null: AWS_CA_BUNDLE, else the usual ones."""
    connect_timeout_s: float = Field(default=3.0, gt=0, le=600)
    read_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    """A request that brings nothing for so long is given up, and tried again."""
    retries: int = Field(default=10, ge=0, le=100)
    """A request that fails is repeated so many times at most."""
    retry_s: float = Field(default=60.0, ge=0, le=3600)
    """No try begins later than so many seconds after the first."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, raw: Any) -> Any:
        """Here and not by pydantic, whose refusal would show the value."""
        if isinstance(raw, cls):
            return raw
        fields = ", ".join(sorted(cls.model_fields))
        if not isinstance(raw, dict):
            raise ValueError(f"expected a mapping with some of the fields {fields}")
        for name in raw:
            if name not in cls.model_fields:
                secret = _SECRET.search(str(name))
                raise ValueError(
                    f"{name}: {_INSTEAD}" if secret else f"{name}: unknown field; allowed here: {fields}"
                )
        return raw

    @field_validator("endpoint_url", mode="before")
    @classmethod
    def _endpoint(cls, url: Any) -> Any:
        if url is None:
            return url
        if not isinstance(url, str):
            raise ValueError("expected text, as https://host:port")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError("not a URL; write it as https://host:port") from None
        if "@" in url or parts.query or parts.fragment:
            raise ValueError(f"more than https://host:port; {_INSTEAD}")
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError("not a URL; write it as https://host:port")
        return url
