"""Sources, multi-crop views, masks, and the pipeline that yields batches."""
