"""From a URI to pixels: fetch compressed bytes, decode them, or say why not."""
