"""A loss as a user writes one: the two methods of docs/tutorial.md, plain pairs as its results."""

import torch


class OwnLoss(torch.nn.Module):
    def forward(self, logps, entropy, inputs):
        loss = -(inputs.advantages[inputs.document_index] * logps).sum()
        return loss, {"own/logps": (logps.detach().sum(), inputs.loss_mask.sum())}

    def denominator(self, num_documents, num_label_tokens):
        return float(num_documents)
