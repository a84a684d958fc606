"""Networks: tensors to tensors, no training code."""
