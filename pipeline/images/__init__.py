"""From a URI to pixels: fetches compressed bytes and decodes them, or says why not."""
