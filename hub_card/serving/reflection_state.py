"""Feeds latents in vLLM's batches: what its model runner asks of a model beside the passes themselves."""

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from modeling_vreflection.regions_vreflection import add_positions

from .forced_tokens import ServedReflectionForcing
from .picture_pool import PicturePool
from .request_reflections import DepartedRequests, RequestReflections
from .server_settings import pool_patches, served_options


logger = init_logger(f"vllm.{__name__}")


class ReflectionModelState(DefaultModelState):
    """vLLM's state of its requests, and their reflections.

    In one step the runner calls `add_request` for those that enter the batch, `prepare_inputs_embeds`, the model, and with its
    states the logits processors, which ask `forced_tokens`.

    Attributes:
        requests (`dict`): By index in vLLM's request state, the reflections of each request of the batch.
        complete (`dict`): Of this step's requests whose last token is computed now, so that another is sampled.
    """

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.options = served_options(self.model_config)
        self.config = self.options.config
        self.token_ids = self.config.latent_token_ids
        self.requests: dict[int, RequestReflections] = {}
        self.indices: dict[str, int] = {}
        self.complete: dict[int, RequestReflections] = {}
        # First come, first served: no more requests than a batch holds leave it until a preempted one returns.
        self.departed = DepartedRequests(4 * self.max_num_reqs)
        self.pool = None
        if self.options.uses_dac:
            # Allocated before vLLM measures what is left for its own cache.
            parts = 2 if self.config.patch_positions == "none" else 3  # keys, values and places
            width = parts, self.inputs_embeds_size
            self.pool = PicturePool(pool_patches(vllm_config), width, self.dtype, device)
            size = self.pool.buffer.nbytes / 2**20
            logger.info("DAC's keys and values: room for %d merged patches, %.1f MiB", len(self.pool.buffer), size)
            self.pool_loads, self.encoded_again = model.loads, 0

    def custom_sampler(self, sampler):
        for processor in sampler.logits_processors:
            if isinstance(processor, ServedReflectionForcing):
                processor.model_state = self
        return None

    def add_request(self, req_index, new_req_data):
        super().add_request(req_index, new_req_data)
        sampling, request_id = new_req_data.sampling_params, new_req_data.req_id
        request = self.departed.take(request_id)
        if request is None:
            request = RequestReflections(
                self.options.of_request(sampling.extra_args),
                self.token_ids,
                new_req_data.prompt_len,
                self.config.think_end_token_id,
                may_start=not self.options.uses_dac or bool(new_req_data.mm_features),
            )
        request.id, request.tokens = request_id, list(new_req_data.prefill_token_ids)  # vLLM's own list grows
        request.start_over(request.tokens[request.prompt_length :])
        self.requests[req_index], self.indices[request_id] = request, req_index

    def remove_request(self, req_id):
        super().remove_request(req_id)
        if (index := self.indices.pop(req_id, None)) is not None:
            self.departed.keep(req_id, self.requests.pop(index))

    def execute_mm_encoder(self, scheduled_encoder_inputs):
        super().execute_mm_encoder(scheduled_encoder_inputs)
        if self.pool is None:
            return
        for request_id, numbers in scheduled_encoder_inputs.items():
            if self.requests[self.indices[request_id]].may_start:
                features = self.encoder_cache.mm_features[request_id]
                self._keep_pictures([features[number] for number in numbers])

    def prepare_inputs_embeds(self, scheduled_encoder_inputs, input_batch, req_states):
        embeds = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        fed = dict(self._latents(input_batch))
        if fed:
            # In place: the buffer's address is in CUDA graphs.
            embeds[list(fed)] = torch.stack(list(fed.values())).to(embeds.dtype)
        return embeds

    def _latents(self, input_batch):
        """Yields, by row of the step's tokens, what is fed to the slots among them: row and latent (D,)."""
        self.complete = {}
        decoding = []
        starts, counts = input_batch.num_computed_tokens_np.tolist(), input_batch.num_scheduled_tokens.tolist()
        for number, index in enumerate(input_batch.idx_mapping_np.tolist()):
            request, first, count = self.requests[index], starts[number], counts[number]
            row = int(input_batch.query_start_loc_np[number])
            if first + count >= len(request.tokens):
                self.complete[index] = request
            if first >= len(request.tokens):
                if request.may_start:
                    decoding.append((row, first, request))
                continue
            for position in range(max(first, request.prompt_length), first + count):
                if request.tokens[position] == request.slot_id:
                    yield row + position - first, self._latent(request, position)
        if not decoding:
            return
        # The one moment that waits for the device: who is in a reflection is known by the tokens alone.
        rows = [row for row, _, _ in decoding]
        for token, (row, position, request) in zip(input_batch.input_ids[rows].tolist(), decoding):
            request.read(token)
            if token == request.slot_id:
                yield row, self._latent(request, position)

    def _latent(self, request: RequestReflections, position: int) -> torch.Tensor:
        """What is fed to the slot at a position (D,): what was fed before, else the state that came before it, or DAC's look."""
        if position not in request.latents:
            latent = request.state_for(position)
            if self.pool is not None:
                latent, look = self._look(request, latent)
                if request.options.latent_tolerance:
                    request.keep_look(position, look)
            request.latents[position] = latent
        return request.latents[position]

    def _look(self, request: RequestReflections, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a state (D,) sees in the request's pictures: latent (D,) and where it looked (L,)."""
        pictures = self.encoder_cache.mm_features[request.id]
        self._keep_pictures(pictures)
        stored = self.pool.gather([picture.identifier for picture in pictures])  # (L, 2 or 3, D)
        keys, values, *places = stored.unbind(1)
        keys, values = (x.unflatten(-1, (self.model.dac.num_heads, -1)).transpose(0, 1)[None] for x in (keys, values))
        mask = torch.ones(1, len(stored), dtype=torch.bool, device=state.device)
        places = places[0][None] if places else None
        latents, look = self.model.dac.attend(state[None, None], keys, values, places, mask)
        return latents[0, 0], look[0, 0]

    def _keep_pictures(self, pictures) -> None:
        """Makes sure that the pool holds these pictures; one that vLLM no longer has is encoded again."""
        if self.pool_loads != self.model.loads:  # other weights since
            self.pool.clear()
            self.pool_loads = self.model.loads
        for picture in [picture for picture in pictures if not self.pool.touch(picture.identifier)]:
            encoded = self.encoder_cache.encoder_outputs.get(picture.identifier)
            if encoded is None:
                self.encoded_again += 1
                (encoded,) = self.encoder_runner.execute_mm_encoder([(picture.modality, picture.data)])
            features = encoded[:, : self.inputs_embeds_size]  # behind them come DeepStack's
            if self.config.patch_positions != "none":
                merge = self.config.vision_config.spatial_merge_size
                _, height, width = picture.data["image_grid_thw"].data.tolist()
                features = add_positions(features, (height // merge, width // merge))
            keys, values, places = self.model.dac.keys_and_values(features[None])
            parts = [x.transpose(1, 2).flatten(2)[0] for x in (keys, values)]
            parts += [] if places is None else [places[0]]
            self.pool.put(picture.identifier, torch.stack(parts, 1))

    def forced_tokens(self, indices: list[int]) -> list[tuple[bool, int | None]]:
        """For requests of the step, by index: whether a reflection may start, and which token is forced, if any.

        Keeps the states of which latents will be made.
        """
        batch = []
        for row, index in enumerate(indices):
            request, token = self.requests[index], None
            if index in self.complete:
                token = request.forced_token
                if token == request.slot_id:
                    request.keep_state(self.model.states[row].clone())
            batch.append((request.may_start, token))
        return batch
