"""Local files and object storage (S3, GCS, Azure): clients, operations, errors and retries."""
