"""The door to oss2: buckets made from a URL and an environment, and their errors in our words.

Credentials are looked up for each request, so temporary ones can be replaced while an upload runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from ckptstore.blob.address import Address
from ckptstore.blob.proxies import proxies_of
from ckptstore.blob.refusals import Refusal, is_unknown_name, unreachable
from ckptstore.errors import CkptError, ConfigError, CredentialsError, TransientError

_CONNECT_TIMEOUT_S = 10.0
_PUBLIC_HOST = re.compile(r"(?:^|\.)oss-([a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com$")


class OSSConnection:
    """Requests to one bucket. Thread-safe.

    Args:
        address: The URL: endpoint, region, signature.
        bucket: Its bucket.
        environ: Where ``OSS_*`` and proxies are looked up; None: the process's environment.
        read_timeout_s: Longest silence of the server.
    """

    def __init__(self, address: Address, bucket: str, environ: Mapping[str, str] | None, read_timeout_s: float) -> None:
        self._bucket = bucket
        self._environ = environ
        self._read_timeout_s = read_timeout_s
        self._auth = address.choice("auth", ("v4", "v1"), "v4")
        self.is_cname = address.flag("cname")
        self.endpoint, self._region = _place(address, os.environ if environ is None else environ)
        if find_spec("oss2") is None or find_spec("fastcrc") is None:
            raise ConfigError("oss:// needs two more packages", hint="pip install 'ckptstore[oss]'", url=address.url)
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        #: A request has succeeded, so the bucket exists.
        self.has_succeeded = False

    def close(self) -> None:
        """Close idle connections; idempotent."""
        with self._lock:
            idle, self._idle = self._idle, []
        for bucket in idle:
            bucket.session.session.close()

    @contextlib.contextmanager
    def request(self, what: str, key: str) -> Iterator[Any]:
        """An oss2.Bucket of this thread's own, whose errors, raised in the body of the ``with``, come out as ours."""
        with self._lock:
            bucket = self._idle.pop() if self._idle else None
        try:
            if bucket is None:
                bucket = self._connect()
            yield bucket
        except CkptError:
            raise
        except Exception as error:
            ours = self._translate(error, what, key)
            if ours is None:
                raise
            raise ours from error
        finally:
            if bucket is not None:
                for response in bucket.session.answers:  # oss2 doesn't read every answer to its end
                    response.close()
                bucket.session.answers.clear()
                with self._lock:
                    self._idle.append(bucket)
        self.has_succeeded = True

    def _connect(self) -> Any:
        import oss2

        logging.getLogger("oss2").setLevel(logging.WARNING)  # below that it logs signatures and session tokens
        make = oss2.ProviderAuthV4 if self._auth == "v4" else oss2.ProviderAuth
        environ = os.environ if self._environ is None else self._environ
        session = oss2.Session(pool_size=2)
        session.answers = []
        session.session.hooks["response"].append(lambda answer, **_: session.answers.append(answer))
        session.session.auth = _keep_headers
        host = urlsplit(self.endpoint).hostname or ""
        is_loopback = host in ("localhost", "127.0.0.1", "::1")
        if is_loopback or environ is not os.environ:
            session.session.trust_env = False  # neither its proxies nor its certificates, but those given
            session.session.verify = environ.get("REQUESTS_CA_BUNDLE") or True
        return oss2.Bucket(
            make(_Credentials(environ, oss2.credentials.Credentials, self._where())),
            self.endpoint,
            self._bucket,
            is_cname=self.is_cname,
            session=session,
            connect_timeout=(_CONNECT_TIMEOUT_S, self._read_timeout_s),
            app_name="ckptstore",
            enable_crc=False,
            region=self._region,
            # For the process's own environment requests knows better (macOS, .netrc).
            proxies=None if is_loopback or environ is os.environ else proxies_of(environ, host) or None,
        )

    def _translate(self, error: Exception, what: str, key: str) -> CkptError | None:
        from xml.etree.ElementTree import ParseError

        import requests
        from oss2 import exceptions as oss
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        place = {**self._where(), "key": key}
        if isinstance(error, oss.ServerError):
            code = error.code
            if code == "InvalidAccessKeyId" and (os.environ if self._environ is None else self._environ).get(
                "OSS_SESSION_TOKEN"
            ):
                code = "SecurityTokenExpired"
            headers = {name.lower(): value for name, value in error.headers.items()}
            refusal = Refusal(what, code, error.status, error.message or "", self._bucket, self.endpoint, key, headers)
            return refusal.error()
        cause = error.exception if isinstance(error, oss.RequestError) else error
        if isinstance(cause, requests.exceptions.SSLError):
            return ConfigError(
                f"could not {what}: TLS with {self.endpoint} failed: {cause}",
                hint="set REQUESTS_CA_BUNDLE to the certificate of a private CA",
                **place,
            )
        if isinstance(cause, (requests.exceptions.ReadTimeout, ReadTimeoutError)):
            return TransientError(
                f"could not {what}: {self.endpoint} did not answer in time", reason="timeout", **place
            )
        is_refused = isinstance(cause, requests.exceptions.ConnectionError) and "Failed to establish" in str(cause)
        if is_refused or is_unknown_name(cause):
            return unreachable(what, cause, place)
        if isinstance(cause, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, oss.ClientError)):
            return ConfigError(f"could not {what} in bucket {self._bucket}: {cause}", **place)
        if isinstance(cause, (requests.exceptions.RequestException, HTTPError, OSError)):
            return TransientError(
                f"could not {what}: the connection to {self.endpoint} broke ({type(cause).__name__})",
                reason="cut_off",
                **place,
            )
        if isinstance(cause, (ParseError, RuntimeError, KeyError, ValueError, AttributeError)):  # oss2's parsers
            return TransientError(
                f"could not {what}: the answer does not come from an object store ({cause})", reason="damaged", **place
            )
        return None

    def _where(self) -> dict[str, Any]:
        return {"bucket": self._bucket, "endpoint": self.endpoint}


class _Credentials:
    """An oss2 credentials provider that looks them up anew for each request."""

    def __init__(self, environ: Mapping[str, str], make: Callable[..., Any], place: Mapping[str, Any]) -> None:
        self._environ = environ
        self._make = make
        self._place = place

    def get_credentials(self) -> Any:
        key, secret = self._environ.get("OSS_ACCESS_KEY_ID"), self._environ.get("OSS_ACCESS_KEY_SECRET")
        if not key or not secret:
            raise CredentialsError(
                f"there are no credentials for bucket {self._place['bucket']} at {self._place['endpoint']}",
                hint="set OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET (and OSS_SESSION_TOKEN for temporary ones)",
                **self._place,
            )
        return self._make(key.strip(), secret.strip(), self._environ.get("OSS_SESSION_TOKEN", "").strip())


def _place(address: Address, environ: Mapping[str, str]) -> tuple[str, str]:
    """Endpoint and region, each from the URL, the environment, or the other."""
    endpoint = address.params.get("endpoint") or environ.get("OSS_ENDPOINT", "")
    region = (address.params.get("region") or environ.get("OSS_REGION", "")).removeprefix("oss-")
    if not endpoint:
        if not region:
            raise address.refuse("names no region", hint="add ?region=cn-hangzhou (for example), or set OSS_REGION")
        endpoint = f"https://oss-{region}.aliyuncs.com"
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise address.refuse("has an endpoint that is none", hint="write endpoint=https://HOST[:PORT]")
    found = _PUBLIC_HOST.search(parts.hostname)
    region = region or (found[1] if found else "")
    if not region:
        raise address.refuse(
            "names no region", hint="add region=cn-hangzhou (for example); requests are signed with it"
        )
    return endpoint, region


def genuine(answer: Any) -> Any:
    """The answer, if OSS gave it; what a proxy or a portal in between says with status 200 has no request id."""
    if not answer.request_id:
        raise ValueError("it has no x-oss-request-id")
    return answer


def _keep_headers(request: Any) -> Any:
    """An auth for requests that does nothing: without one it would let ~/.netrc replace the signature."""
    return request
