//! S3 on the servers that `scripts/with-s3.sh` starts. Run by `make test-s3`.

mod servers;
