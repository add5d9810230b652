"""The tokens that a reflection forces and bans, in vLLM's batches."""

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from .served_options import ServedOptions


class ServedReflectionForcing(LogitsProcessor):
    """`ReflectionForcing` and `ReflectionTokenBan` of `generate`; here both come before what keeps only the likeliest tokens.

    Attributes:
        server (`ServedOptions`): Of the class: the server's, in the process that admits requests.
        model_state (`ReflectionModelState`): What knows the requests of the batch, in the process that runs the model.
    """

    server: ServedOptions | None = None
    model_state = None

    @classmethod
    def validate_params(cls, sampling_params):
        cls.server.check_request(sampling_params)

    def apply(self, logits, ctx: LogitsContext):
        start_id, slot_id, end_id = self.model_state.token_ids
        logits[:, slot_id] = logits[:, end_id] = float("-inf")
        batch = self.model_state.forced_tokens(ctx.idx_mapping_np.tolist())
        if banned := [row for row, (may_start, _) in enumerate(batch) if not may_start]:
            logits[banned, start_id] = float("-inf")
        if forced := [(row, token) for row, (_, token) in enumerate(batch) if token is not None]:
            rows, tokens = torch.tensor(forced, device=logits.device).T
            logits[rows] = float("-inf")
            logits[rows, tokens] = 0.0
        return logits
