"""The test kit, shipped: what every store must pass, real and faithful servers to run against, planned faults.

* ``BlobStoreTests`` (``ckptstore.testing.blob_store_tests``): the contract of a blob store as a pytest class.
* ``SeaweedServer`` (``ckptstore.testing.s3_server``): a real S3 server on loopback.
* ``OSSServer`` (``ckptstore.testing.oss_server``): Alibaba OSS's protocol, checked strictly.
* ``FaultProxy`` (``ckptstore.testing.faults``): a proxy that breaks connections as planned.

Nothing is imported here, so that the demo's server needs no pytest.
"""
