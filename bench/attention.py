"Causal attention on a CPU in bf16, forward and backward: runs of queries, compiled, against torch's kernel."
import argparse
import time

import torch
import torch.nn.functional as F

from golf_nb.block import trained_attention

def fused(q, k, v):
    "Torch's kernel on the same layout."
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def seconds(attend, parts):
    "Time one forward and backward pass."
    at = time.perf_counter()
    attend(*parts).sum().backward()
    return time.perf_counter() - at


def main():
    "Print a table; rounds of both are interleaved, and the median of the ratios counts."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=15)
    rounds = parser.parse_args().rounds
    ours = torch.compile(trained_attention, dynamic=False)
    print(f'{"B x T x H/K x Dh":>20} {"fused, ms":>10} {"ours, ms":>10} {"ratio":>6}')
    for B, T, H, K, Dh in ((8, 512, 4, 2, 48), (8, 512, 8, 4, 32), (8, 512, 4, 2, 64)):
        shapes = [(B, T, heads, Dh) for heads in (H, K, K)]
        parts = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        for attend in (ours, fused): seconds(attend, parts)
        pairs = [(seconds(fused, parts), seconds(ours, parts)) for _ in range(rounds)]
        a, b = sorted(pairs, key=lambda pair: pair[0]/pair[1])[rounds//2]
        print(f'{f"{B} x {T} x {H}/{K} x {Dh}":>20} {1000*a:10.1f} {1000*b:10.1f} {a/b:6.2f}')


if __name__ == '__main__': main()
