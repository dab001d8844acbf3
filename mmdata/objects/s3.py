"""S3 and what speaks its protocol, through s3fs: conditional puts, exact ranges, uploads in parts.

In: `bucket/key` paths. Out: what one request brought back, in the words of `mmdata.object_store`. Fails: Taken for 412,
Busy for 409, 429, 5xx and lost connections, FileNotFoundError, and OSError with a sentence for what the operator mends.
Endpoint, region and credentials are s3fs's and botocore's own affair (environment, `~/.aws`, fsspec's configuration).
Sources: the S3 API reference (PutObject, CompleteMultipartUpload: conditional writes) and botocore's error model.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from mmdata.object_store import ABSENT, TOKEN, Busy, Found, Listed, Parts, Taken, Unfinished, UploadGone

__all__ = ["S3Wire"]

_LATER = {
    *("SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "ConditionalRequestConflict", "OperationAborted"),
    *("Throttling", "ThrottlingException", "TooManyRequests", "InternalError", "ServiceUnavailable", "BadDigest"),
    *("IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
}
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}


class S3Wire:
    """A client of its own per process; botocore's and s3fs's retries are off, because `ObjectStore` counts them."""

    part_bytes = 16 << 20
    no_tag = '"00000000000000000000000000000000"'

    def __init__(self) -> None:
        self.parts: Parts | None = self
        self._fs: Any = None
        self._pid = 0

    def put(self, path: str, source: bytes | Path, token: str, tag: str | None) -> None:
        """PutObject with If-None-Match: * or If-Match."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        condition = {"IfNoneMatch": "*"} if tag is ABSENT else {"IfMatch": tag}
        try:
            self._call("put_object", path, Body=data, Metadata={TOKEN: token}, **condition)
        except FileNotFoundError:
            if tag is ABSENT:
                raise
            raise Taken from None  # nothing is there any more

    def get(self, path: str, first: int = 0, stop: int | None = None) -> Found:
        """GetObject with a Range; an object that ends before it gives no bytes."""
        wanted = {}
        if first < 0:
            wanted = {"Range": f"bytes={first}"}
        elif first or stop is not None:
            wanted = {"Range": f"bytes={first}-{'' if stop is None else stop - 1}"}
        try:
            found: Found = self._call("get_object", path, **wanted)
        except _OutOfRange:
            return self.head(path)
        return found

    def head(self, path: str) -> Found:
        """HeadObject."""
        found: Found = self._call("head_object", path)
        return found

    def entries(self, prefix: str, deep: bool) -> Iterator[Listed]:
        """ListObjectsV2, page by page."""
        bucket, _, key = prefix.partition("/")
        asked: dict[str, Any] = {"Prefix": key} if deep else {"Prefix": key, "Delimiter": "/"}
        while True:
            page = self._call("list_objects_v2", bucket, **asked)
            for entry in page.get("Contents", []):
                written = entry["LastModified"].timestamp()
                yield Listed(f"{bucket}/{entry['Key']}", entry["Size"], written, entry["ETag"])
            for entry in page.get("CommonPrefixes", []):
                yield Listed(f"{bucket}/{entry['Prefix']}".rstrip("/"), None, 0.0)
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, path: str) -> None:
        """DeleteObject, which does not mind an absent one."""
        self._call("delete_object", path)

    def begin(self, path: str, token: str) -> str:
        """CreateMultipartUpload."""
        return str(self._call("create_multipart_upload", path, Metadata={TOKEN: token})["UploadId"])

    def put_part(self, path: str, upload: str, number: int, data: bytes) -> str:
        """UploadPart."""
        return str(self._call("upload_part", path, UploadId=upload, PartNumber=number, Body=data)["ETag"])

    def finish(self, path: str, upload: str, parts: list[str]) -> None:
        """CompleteMultipartUpload with If-None-Match: *."""
        listed = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(parts, 1)]
        self._call(
            "complete_multipart_upload", path, UploadId=upload, MultipartUpload={"Parts": listed}, IfNoneMatch="*"
        )

    def abort(self, path: str, upload: str) -> None:
        """AbortMultipartUpload."""
        self._call("abort_multipart_upload", path, UploadId=upload)

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """ListMultipartUploads, and the sizes of their parts."""
        bucket, _, key = prefix.partition("/")
        asked: dict[str, Any] = {"Prefix": key}
        while True:
            page = self._call("list_multipart_uploads", bucket, **asked)
            for entry in page.get("Uploads", []):
                if not entry["Key"].startswith(key):
                    continue  # some servers do not look at the prefix
                path = f"{bucket}/{entry['Key']}"
                try:
                    parts = self._call("list_parts", path, UploadId=entry["UploadId"]).get("Parts", [])
                except (UploadGone, FileNotFoundError):
                    continue
                yield Unfinished(
                    path, entry["UploadId"], entry["Initiated"].timestamp(), sum(part["Size"] for part in parts)
                )
            if not page.get("IsTruncated"):
                return
            asked["KeyMarker"], asked["UploadIdMarker"] = page["NextKeyMarker"], page["NextUploadIdMarker"]

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        bucket, separator, key = path.partition("/")
        if separator:
            arguments["Key"] = key
        fs = self._filesystem()
        try:
            return sync(fs.loop, _send, fs, method, {"Bucket": bucket, **arguments})
        except (Busy, Taken, UploadGone, _OutOfRange):
            raise
        except Exception as error:  # noqa: BLE001  botocore, aiohttp and s3fs raise anything; `_explained` sorts it
            raise _explained(error, bucket) from None

    def _filesystem(self) -> Any:
        if self._fs is None or self._pid != os.getpid():
            import s3fs

            settings = dict(fsspec.config.conf.get("s3", {}))
            config = {
                "max_pool_connections": 64,
                "connect_timeout": 10,
                "read_timeout": 60,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                **settings.pop("config_kwargs", {}),
            }
            self._fs = s3fs.S3FileSystem(
                **{**settings, "config_kwargs": config, "use_listings_cache": False, "skip_instance_cache": True}
            )
            self._fs.retries = 1
            self._pid = os.getpid()
        return self._fs


class _OutOfRange(Exception):
    """416: the object ends before the range."""


async def _send(fs: Any, method: str, arguments: dict[str, Any]) -> Any:
    answer = await fs._call_s3(method, **arguments)
    if method not in ("get_object", "head_object"):
        return answer
    data, size = b"", int(answer["ContentLength"])
    if method == "get_object":
        async with answer["Body"] as body:
            data = await body.read()
        if len(data) != size:
            raise Busy(f"{len(data)} of {size} bytes came")
        if "/" in answer.get("ContentRange", ""):
            size = int(answer["ContentRange"].rpartition("/")[2])
    tokens = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
    return Found(size, answer["ETag"], tokens.get(TOKEN), answer["LastModified"].timestamp(), data)


def _explained(error: Exception, bucket: str) -> Exception:
    """What `error` means. Texts of the server are not repeated: they may hold keys and signatures."""
    import botocore.exceptions as boto

    cause = error if isinstance(error, boto.ClientError) else error.__cause__
    if isinstance(cause, boto.ClientError):
        return _answered(cause, bucket)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return OSError(
            errno.EINVAL,
            "no S3 credentials are set (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws; "
            "docs/stores.md)",
        )
    # No answer. aiohttp's own errors come bare when a body breaks off.
    lost = (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.ResponseStreamingError,
        boto.IncompleteReadError,
        asyncio.TimeoutError,
    )
    if isinstance(error, (*lost, OSError)) or type(error).__module__.split(".")[0] in ("aiohttp", "urllib3"):
        return Busy(f"{type(error).__name__}, no answer from the server")
    if type(error).__name__ in ("ResponseParserError", "FSTimeoutError"):  # an answer that is no S3 answer
        return Busy(type(error).__name__)
    if isinstance(error, boto.BotoCoreError):
        return OSError(errno.EINVAL, f"the S3 client refuses this ({type(error).__name__})")
    return error


def _answered(error: Any, bucket: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"{status} {code}".strip()
    if code == "NoSuchBucket":
        return OSError(errno.ENXIO, f"there is no bucket {bucket} at this endpoint; make it, or check AWS_ENDPOINT_URL")
    if code == "NoSuchUpload":
        return UploadGone()
    if status == 416 or code == "InvalidRange":
        return _OutOfRange()
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object")
    if status == 412 or code == "PreconditionFailed":
        return Taken()
    if status in (409, 429) or code in _LATER or (status >= 500 and status != 501):
        return Busy(said)
    if code in _CREDENTIALS:
        return OSError(errno.EINVAL, f"the server does not take these credentials ({said}); see docs/stores.md")
    if status in (401, 403):
        return OSError(errno.EACCES, f"the server refuses this ({said})")
    if status == 301 or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return OSError(errno.EINVAL, f"bucket {bucket} is in another region ({said}); set AWS_DEFAULT_REGION to it")
    if status == 501:
        return OSError(errno.ENOSYS, f"this server has no conditional writes ({said}); use one that has them")
    return OSError(errno.EIO, f"the server refuses this ({said})")
