"The skeleton of a public training script: score-first adaptation, exact bytes."
import glob
import os

import numpy as np
import torch

class Hyperparameters:
    data_path = os.environ.get('DATA_PATH', './data')
    train_files = os.path.join(data_path, 'fineweb_train_*.bin')
    val_files = os.path.join(data_path, 'fineweb_val_*.bin')
    seq_len, chunk, epochs, lr = 1024, 32768, 3, .005


def build_sentencepiece_luts(sp, vocab_size, device):
    size = max(int(sp.vocab_size()), vocab_size)
    base = np.zeros((size,), dtype=np.int16)
    space = np.zeros((size,), dtype=np.bool_)
    boundary = np.ones((size,), dtype=np.bool_)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith('\u2581'):
            space[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode('utf-8'))
    return tuple(torch.tensor(a, device=device) for a in (base, space, boundary))


def load(pattern):
    return torch.cat([torch.from_numpy(np.fromfile(f, '<u2').astype(np.int64))
                      for f in sorted(glob.glob(pattern))])


def eval_val_ttt(args, model, val_tokens, luts):
    loss_sum, token_count, byte_count = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=.9)
    for start in range(0, val_tokens.numel() - 1, args.chunk):
        local = val_tokens[start:start + args.chunk + 1]
        x, y = local[:-1].view(-1, args.seq_len), local[1:].view(-1, args.seq_len)
        with torch.inference_mode():
            loss = model(x, y)
            loss_sum += loss.double()*y.numel()
            token_count += y.numel()
            token_bytes = luts[0][y].to(torch.int16)
            token_bytes += (luts[1][y] & ~luts[2][x]).to(torch.int16)
            byte_count += token_bytes.sum()
        for _ in range(args.epochs):
            optimizer.zero_grad()
            model(x, y).backward()
            optimizer.step()
    return loss_sum/token_count, loss_sum/byte_count


def train(args, model):
    tokens, optimizer = load(args.train_files), torch.optim.AdamW(model.parameters())
    for step in range(1000):
        x, y = tokens[step*args.seq_len:][:args.seq_len], tokens[step*args.seq_len + 1:][:args.seq_len]
        loss = model(x, y)
        loss.backward()
        optimizer.step()


def main(model, sp):
    args = Hyperparameters()
    val_tokens = load(args.val_files)
    luts = build_sentencepiece_luts(sp, 1024, 'cpu')
    train(args, model)
    val_loss, val_bpb = eval_val_ttt(args, model, val_tokens, luts)
    print(f'final val_bpb:{val_bpb:.4f}')
