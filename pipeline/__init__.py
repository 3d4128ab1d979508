"""Data in and out: storage, inputs, images, COCO files, the table, results, labelling and training."""
