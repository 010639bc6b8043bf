"""From text to token batches: tokenizers, document readers, preprocessing to indexed datasets,
sampling."""
