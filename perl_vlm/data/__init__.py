"""From records to tensors: sources, images, rendering, padding."""
