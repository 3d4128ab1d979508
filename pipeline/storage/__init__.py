"""Local files and object storage: every handle, error and retry (S3, GCS, Azure)."""
