#!/bin/sh
# LocalStack runs this once it is ready: the bucket the demo writes to.
awslocal s3api create-bucket --bucket ckptstore-demo
