"""Amazon S3 and what speaks its language: ``s3://bucket/prefix``.

Parameters of the URL, all optional::

    endpoint       http(s)://host[:port] of another server than Amazon's
    region         where the bucket is
    addressing     path | virtual | auto: the bucket in the path or in the host name
    profile        a profile of the AWS configuration files
    requester_pays true: this account pays for requests and transfer
    storage_class  STANDARD, STANDARD_IA, INTELLIGENT_TIERING, ...
    sse            AES256 | aws:kms | aws:kms:dsse: encryption at rest
    kms_key        key id or ARN, for sse=aws:kms
    sse_c          env:AWS_NAME | file:/abs/path: where a key of your own is, 32 bytes or their base64; every request
                   sends it, nobody keeps it, and without it nothing can be read. Amazon takes it over https only
    tags           team:nlp,project:x: tags of each object
    checksum       auto | md5 | crc32 | none: what guards a body on its way. auto: a CRC for Amazon, MD5 for all others,
                   since each of them checks it; crc32 takes a fifth of the time where the server checks that as well
    conditional_put  false: the server ignores or rejects If-None-Match

boto3 is imported by the first request, in :mod:`ckptstore.blob.s3.connection` and nowhere else. Its own retries
are off; see :mod:`ckptstore.blob.retry`.
"""

from ckptstore.blob.s3.store import S3BlobStore

__all__ = ["S3BlobStore"]
