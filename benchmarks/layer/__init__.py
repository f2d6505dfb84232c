"""One adapted linear layer, ours against PEFT and the frozen linear: time, memory kept, allocated and at the peak."""
