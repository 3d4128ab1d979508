"""What labels are worth and look like: COCO metrics, mIoU, drawings."""
