"""What no page can show: the guarded reader under fire, broken folders, and a training run that is stopped and resumed.

The hostile pickles would create the file `ran` if any of them were executed.
"""
import functools
import hashlib
import http.server
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import fishnet_nb.data as data
import albumentations as A  # after fishnet_nb.data, which keeps it offline
from fishnet_nb.data import CIFAR_FOLDER, CIFARDataModule, CIFARDataset, EpochSampler, find_data, load_cifar, load_data, read_classes, train_transform, unpickle
from fishnet_nb.shapes import SHAPE_CLASSES, make_shapes, write_shapes

BATCHES = [*data.TRAIN_BATCHES, data.TEST_BATCH]


def python2_pickle(rows: int = 3) -> bytes:
    "A batch by the opcodes of the official files, which Python 2 wrote."
    text = lambda s: b'U' + bytes([len(s)]) + s
    pixels = bytes(i % 251 for i in range(rows*3072))
    dtype = b'cnumpy\ndtype\nq\x05' + text(b'u1') + b'K\x00K\x01\x87R(K\x03' + text(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    array = (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85' + text(b'b') + b'\x87R(K\x01K' + bytes([rows])
             + b'M\x00\x0c\x86' + dtype + b'\x89T' + struct.pack('<i', len(pixels)) + pixels + b'tb')
    labels = b'](' + b''.join(b'K' + bytes([i]) for i in range(rows)) + b'e'
    return b'\x80\x02}q\x01(' + text(b'batch_label') + text(b'one') + text(b'labels') + labels + text(b'data') + array + b'u.'


def batch(rows: int = 3, **changes) -> dict:
    entries = {b'data': np.arange(rows*3072, dtype=np.int64).reshape(rows, 3072).astype(np.uint8), b'labels': list(range(rows))}
    return {**entries, **{key.encode(): value for key, value in changes.items()}}


@pytest.fixture
def folder(tmp_path) -> Path:
    "A whole small dataset."
    return write_shapes(tmp_path/CIFAR_FOLDER, n_train=50, n_test=10)


def put(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, 2))
    return path


# ------------------------------------------------------------------ what is read

@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_reads_what_any_python_writes(tmp_path, protocol):
    array = np.arange(24).reshape(4, 6)
    for dtype in ('u1', 'i1', '<i2', '<i8', '>i4', '<f4', '>f8', 'b1'):
        for given in (array.astype(dtype), array.astype(dtype).T, array.astype(dtype)[::2], array.astype(dtype)[:, 0], array.astype(dtype)[0, 0:0]):
            if protocol == 2 and given.size == 0: continue  # written as a call of bytes(), which isn't admitted
            found = unpickle(put(tmp_path/'batch', pickle.dumps({b'data': given, b'labels': [1, 255, 70000, -1, 2**40], 'x': [(), (1, None), True, 2.5]}, protocol)))
            np.testing.assert_array_equal(found[b'data'], given)
            assert found[b'labels'] == [1, 255, 70000, -1, 2**40] and found[b'x'] == [(), (1, None), True, 2.5]


def test_reads_python_2_files_as_pickle_does(tmp_path):
    found, expected = unpickle(put(tmp_path/'batch', python2_pickle())), pickle.loads(python2_pickle(), encoding='bytes')
    np.testing.assert_array_equal(found.pop(b'data'), expected.pop(b'data'))
    assert found == expected and found[b'labels'] == [0, 1, 2]


def test_pickle_agrees_on_written_shapes(folder):
    cifar, raw = load_cifar(folder), pickle.loads((folder/'test_batch').read_bytes())
    np.testing.assert_array_equal(cifar.test_images.reshape(10, -1), raw[b'data'])
    assert raw[b'labels'] == cifar.test_labels.tolist() and cifar.classes == SHAPE_CLASSES


# ------------------------------------------------------------------ what is refused

class Runs:
    "Pickles as a call of `function(*args)`."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


def hostile(tmp_path: Path) -> dict[str, bytes]:
    ran = str(tmp_path/'ran')
    touch = f'open({ran!r}, "w")'
    array, call = np.zeros((2, 2), np.uint8), Runs(os.system, f'touch {ran}')
    recon = b'cnumpy.core.multiarray\n_reconstruct\n'
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = recon + b'cnumpy\nndarray\nK\x00\x85U\x01b\x87R'
    big = struct.pack('<q', 10**12)
    named = {f'{name}, protocol {p}': pickle.dumps(value, p) for p in range(6) for name, value in {
        'os.system': call, 'eval': Runs(eval, touch), 'exec': Runs(exec, touch), 'nested': {b'data': [[(call,)]], b'labels': []},
        'in a key': {b'data': 1, call: 2}, 'subprocess': Runs(subprocess.call, ['touch', ran]), 'getattr': Runs(getattr, 'x', 'upper'),
        'object array': {b'data': np.array([call], dtype=object)}, 'structured array': {b'data': np.zeros(2, 'u1,i4')},
        'strings': {b'data': np.array(['a'])}, 'scalar': {b'data': np.float64(1)}, 'masked': {b'data': np.ma.array([1])}, 'matrix': {b'data': np.array([[1]]).view(np.recarray)},
        'set': {b'data': {1}}, 'path': Path('x'), 'global': os.getcwd, 'complex': {b'data': np.zeros(2, complex)}, 'dates': {b'data': np.zeros(2, 'M8[s]')}}.items()}
    raw = {
        'GLOBAL only': b'\x80\x02cos\nsystem\n.', 'INST': f"(S'touch {ran}'\nios\nsystem\n.".encode(), 'OBJ': f"(cos\nsystem\nS'touch {ran}'\no.".encode(),
        'NEWOBJ': b'\x80\x02cnumpy\nndarray\n' + b'J' + struct.pack('<i', 2**31 - 1) + b'\x85\x81.', 'NEWOBJ_EX': b'\x80\x04cnumpy\nndarray\n)}\x92.',
        'EXT1': b'\x80\x02\x82\x01.', 'EXT2': b'\x80\x02\x83\x01\x00.', 'EXT4': b'\x80\x02\x84\x01\x00\x00\x00.',
        'PERSID': b'Px\n.', 'BINPERSID': b'\x80\x02K\x01Q.', 'NEXT_BUFFER': b'\x80\x05\x97.', 'READONLY_BUFFER': b'\x80\x05N\x98.',
        'calls ndarray': b'\x80\x02cnumpy\nndarray\n' + b'\x8a\x08' + big + b'\x85R.',
        'calls a list': b'\x80\x02](K\x01e)R.', 'calls a number': b'\x80\x02K\x01)R.',
        'state for a function': b'\x80\x02cnumpy\ndtype\n}U\x04nameU\x01xsb.', 'slots for a function': b'\x80\x02cnumpy\ndtype\nN}U\x04nameU\x01xs\x86b.',
        'state for a dict': b'\x80\x02}}U\x01aK\x01sb.', 'subclass': recon + b'cnumpy\ndtype\nK\x00\x85U\x01b\x87R.', 'kind is an array': recon + empty + b'K\x00\x85U\x01b\x87R.',
        'claims 10^12 bytes': b'\x80\x02}U\x04data' + empty + b'(K\x01\x8a\x08' + big + b'\x85' + dtype + b'\x89U\x01xtbs.',
        '10^18 rows of nothing, twice': b'\x80\x02}U\x04data' + empty + b'(K\x01' + (b'\x8a\x08' + struct.pack('<q', 10**18))*2 + b'K\x00\x87' + dtype + b'\x89U\x00tbs.',
        'many sides of 250 bytes': b'\x80\x02}U\x04data' + empty + b'(K\x01(\x8a\xfa' + b'\x01'*250 + b'q\x01' + b'h\x01'*8000 + b't' + dtype + b'\x89U\x01xtbs.',
        '100,000 sides of 1': b'\x80\x02}U\x04data' + empty + b'(K\x01(' + b'K\x01'*100_000 + b't' + dtype + b'\x89U\x02xxtbs.',
        'negative side': b'\x80\x02}U\x04data' + empty + b'(K\x01J\xff\xff\xff\xff\x85' + dtype + b'\x89U\x01xtbs.',
        'side is true': b'\x80\x02}U\x04data' + empty + b'(K\x01\x88\x85' + dtype + b'\x89U\x01xtbs.',
        'no dtype': b'\x80\x02}U\x04data' + empty + b'(K\x01K\x01\x85N\x89U\x01xtbs.', 'short state': b'\x80\x02}U\x04data' + empty + b'(K\x01tbs.',
        'dtype code': b'\x80\x02cnumpy\ndtype\nU\x01OK\x00K\x01\x87R.', 'dtype of a dict': b'\x80\x02cnumpy\ndtype\n}K\x00K\x01\x87R.',
        'dtype with fields': b"\x80\x02cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NU\x01a}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        'codec': b'\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.', 'encode a list': b'\x80\x02c_codecs\nencode\n]\x85R.',
        'encode bytes': b'\x80\x02c_codecs\nencode\nU\x01a\x85R.', 'other codecs': b'\x80\x02c_codecs\ndecode\nU\x01aU\x05ascii\x86R.',
        'dotted name': b'\x80\x04\x8c\x05numpy\x8c\x12ndarray.__class__\x93.'.replace(b'\x12', b'\x11'), 'name is a list': b'\x80\x04\x8c\x05numpy]\x93.',
        'memo that is not there': b'\x80\x02h\x07.', 'memo of nothing': b'\x80\x02q\x01.',
        'LONG4 of 2 GB': b'\x80\x02\x8b\xff\xff\xff\x7f1.', 'negative LONG4': b'\x80\x02\x8b\xff\xff\xff\xff1.', 'LONG of many digits': b'L' + b'9'*100_000 + b'L\n.',
        'BINBYTES8 of 2^62': b'\x80\x04\x8e' + struct.pack('<Q', 2**62) + b'x.', 'BINBYTES8 of 2^64': b'\x80\x04\x8e' + b'\xff'*8 + b'x.',
        'BYTEARRAY8 of 2^62': b'\x80\x05\x96' + struct.pack('<Q', 2**62) + b'x.', 'FRAME of 2^62': b'\x80\x04\x95' + struct.pack('<Q', 2**62) + b'N.',
        'BINSTRING of -1': b'\x80\x02T\xff\xff\xff\xffx.', 'BINUNICODE of 4 GB': b'\x80\x02X\xff\xff\xff\xffx.', 'not UTF-8': b'\x80\x02X\x01\x00\x00\x00\xff.',
        '100,000 tuples deep': b'\x80\x02)' + b'\x85'*100_000 + b'.', '100,000 lists deep': b'\x80\x02' + b'](' * 100_000 + b'e'*100_000 + b'.',
        'deep tuple as a key': b'\x80\x02})' + b'\x85'*100_000 + b'Ns.', 'list as a key': b'\x80\x02}]Ns.', 'odd entries': b'\x80\x02}(U\x01au.',
        'a million marks': b'\x80\x02' + b'('*1_100_000 + b'.', 'a million numbers': b'\x80\x02' + b'N'*1_100_000 + b'.',
        'pop below a mark': b'\x80\x02N(\x85.', 'append to a number': b'\x80\x02K\x01K\x02a.', 'stack left empty': b'\x80\x02.', 'unknown protocol and opcode': b'\x80\xff\xff.',
        'bytes out of nothing': b'\x80\x02X' + struct.pack('<I', 10**5) + b'a'*10**5 + b'q\x01' + b'c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R'*2000 + b'.',
        'nothing': b'', 'a text': b'hello', 'zeros': bytes(1000), 'a zip': b'PK\x03\x04' + bytes(100), 'a PNG': b'\x89PNG\r\n\x1a\n', 'HTML': b'<!DOCTYPE html>', 'a list': pickle.dumps([1]),
        'a number': pickle.dumps(1), 'itself': b'\x80\x02]q\x01h\x01a.',
    }
    return named | raw


def test_hostile_files_are_refused_and_nothing_runs(tmp_path):
    for name, content in hostile(tmp_path).items():
        path = put(tmp_path/'data_batch_1', content)
        tracemalloc.start(); start = time.time()
        with pytest.raises(ValueError, match='data_batch_1') as caught: unpickle(path)
        took, peak = time.time() - start, tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert type(caught.value) is ValueError and len(str(caught.value)) < 1000 and '\n' not in str(caught.value), name
        assert not (tmp_path/'ran').exists(), name
        assert peak < 300e6 and took < 30, (name, peak, took)


def test_a_far_memo_takes_no_room(tmp_path):
    tracemalloc.start()
    assert unpickle(put(tmp_path/'batch', b'\x80\x02}r\xff\xff\xff\x7f.')) == {}
    assert tracemalloc.get_traced_memory()[1] < 1e6; tracemalloc.stop()


def test_says_what_was_asked_for(tmp_path):
    with pytest.raises(ValueError, match='posix.system|nt.system'): unpickle(put(tmp_path/'b', Runs(os.system, 'x')))
    with pytest.raises(ValueError, match='builtins?.*eval'): unpickle(put(tmp_path/'b', Runs(eval, '1')))
    with pytest.raises(ValueError, match='OBJ'): unpickle(put(tmp_path/'b', b'(cnumpy\ndtype\no.'))
    with pytest.raises(ValueError, match='cut short'): unpickle(put(tmp_path/'b', python2_pickle()[:5000]))


@pytest.mark.parametrize('content', [python2_pickle(), *(pickle.dumps(batch(), p) for p in range(2, 6))], ids=['python 2', *(f'protocol {p}' for p in range(2, 6))])
def test_truncated_anywhere(tmp_path, content):
    starts = [position for _, _, position in data.pickletools.genops(content)]
    for cut in {*starts, *range(0, len(content), 97), len(content) - 1}:
        with pytest.raises(ValueError, match='batch'): unpickle(put(tmp_path/'batch', content[:cut]))


def mutated(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    "A copy with one to four changes, nine in ten of them outside the pixels."
    for _ in range(rng.randint(1, 4)):
        content = content or b'.'
        n = len(content)
        def place(): return rng.randrange(n) if rng.random() < .1 else rng.choice((rng.randrange(min(n, 260)), n - 1 - rng.randrange(min(n, 260))))
        at = place()
        head, tail = content[:at], content[at:]
        content = rng.choice((
            lambda: head + bytes([rng.randrange(256)]) + tail[1:],  # another byte
            lambda: head + bytes([tail[0] ^ (1 << rng.randrange(8))]) + tail[1:],  # another bit
            lambda: head + tail[rng.randint(1, 30):],  # a gap
            lambda: head + rng.randbytes(rng.randint(1, 8)) + tail,  # noise put in
            lambda: head + content[place():][:rng.randint(1, 60)] + tail,  # a part of itself put in
            lambda: head + rng.choice(others)[rng.randrange(200):][:rng.randint(1, 80)] + tail,  # a part of another file put in
            lambda: head + bytes([rng.choice(OPCODES)]) + tail,  # an instruction put in
        ))()
    return content or b'.'


OPCODES = [ord(opcode.code) for opcode in data.pickletools.opcodes]


def test_ten_thousand_mutated_batches(tmp_path):
    "Each ends in a ValueError that names the file, or in images and labels as they should be."
    rng, path, refused = random.Random(0), tmp_path/'data_batch_1', 0
    seeds = [python2_pickle(), *(pickle.dumps(batch(), p) for p in range(2, 6)), *list(hostile(tmp_path).values())[:40]]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for i in range(10_000):
            put(path, mutated(seeds[i % 5], rng, seeds))
            try: images, labels = data._read_batch(path, 10)
            except ValueError as e:
                assert type(e) is ValueError and 'data_batch_1' in str(e) and len(str(e)) < 1000, repr(e)
                refused += 1
            else:
                assert images.dtype == np.uint8 and images.shape == (len(labels), 3, 32, 32) and len(labels) >= 1
                assert labels.dtype == np.int64 and labels.min() >= 0 and labels.max() < 10
    assert not (tmp_path/'ran').exists() and 2000 < refused < 9990


# ------------------------------------------------------------------ broken folders

def breaks(error, match):
    "Loading raises `error` with a message that matches."
    return pytest.raises(error, match=match)


@pytest.mark.parametrize('changes, match', [
    (dict(data=None), 'data.*NoneType|data.*missing'), (dict(data=[1, 2]), 'data'), (dict(data=np.zeros((3, 3072))), 'float64'), (dict(data=np.zeros((3, 3072), np.int8)), 'int8'),
    (dict(data=np.zeros((3, 3071), np.uint8)), r'3, 3071'), (dict(data=np.zeros((3, 3, 32, 32), np.uint8)), r'3, 3, 32, 32'), (dict(data=np.zeros(3*3072, np.uint8)), r'9216'),
    (dict(labels=None), 'labels'), (dict(labels=[0, 1]), '2 labels for 3 images'), (dict(labels=[0, 1, 2, 3]), '4 labels for 3'), (dict(labels=[0, 1, 10]), 'label 2 is 10.*0 to 9'),
    (dict(labels=[-1, 1, 2]), 'label 0 is -1'), (dict(labels=[0, 1.0, 2]), 'label 1'), (dict(labels=[0, '1', 2]), 'label 1'), (dict(labels=[0, True, 2]), 'label 1'),
    (dict(labels=(0, 1, 2)), 'labels'), (dict(labels=np.array([0, 1, 11])), 'label 2 is 11'), (dict(labels=np.array([0., 1, 2])), 'label 0'), (dict(labels=np.array([0, 1])), '2 labels for 3 images'), (dict(labels=np.zeros((3, 1), int)), 'labels is of type ndarray'), (dict(labels=[0, 1, 10**18]), 'label 2'), (dict(labels=[0, 1, -10**600]), 'label 2'),
])
def test_wrong_content(folder, changes, match):
    put(folder/'data_batch_3', batch(**changes))
    with breaks(ValueError, f'data_batch_3.*{match}'): load_cifar(folder)


def test_no_rows(folder):
    put(folder/'test_batch', pickle.dumps(batch(0), 4))
    with breaks(ValueError, 'test_batch.*n ≥ 1'): load_cifar(folder)


@pytest.mark.parametrize('names', [None, [], [1], b'cat', [b''], [b'a\nb'], [[b'a']]])
def test_wrong_class_names(folder, names):
    put(folder/'batches.meta', pickle.dumps({b'label_names': names}, 4))
    with breaks(ValueError, 'batches.meta.*label_names'): load_cifar(folder)


def test_class_names_in_other_scripts(folder):
    "As UTF-8 or as a text; what is neither ASCII nor UTF-8 is read as Python 2's Latin-1."
    for names, read in ([name.encode() for name in ('é', '고양이')], ('é', '고양이')), (['é', '고양이'], ('é', '고양이')), ([b'\xe9', b'x'], ('é', 'x')):
        put(folder/'batches.meta', pickle.dumps({b'label_names': names}, 4))
        assert read_classes(folder/'batches.meta') == read


def test_text_keys_are_as_good_as_bytes(folder):
    before = load_cifar(folder)
    for name in (*BATCHES, 'batches.meta'):
        put(folder/name, pickle.dumps({key.decode(): value for key, value in pickle.loads((folder/name).read_bytes()).items()}))
    np.testing.assert_array_equal(load_cifar(folder).train_images, before.train_images)


def test_class_names_bound_the_labels(folder):
    put(folder/'batches.meta', {b'label_names': [b'only', b'two']})
    with breaks(ValueError, 'integer from 0 to 1'): load_cifar(folder)


@pytest.mark.parametrize('name', [*BATCHES, 'batches.meta'])
def test_missing_short_or_folder(folder, name):
    whole = (folder/name).read_bytes()
    put(folder/name, whole[:len(whole)//2])
    with breaks(ValueError, name): load_cifar(folder)
    (folder/name).unlink()
    with breaks(FileNotFoundError, f'lacks {name}'): load_cifar(folder)
    (folder/name).mkdir()
    with breaks(IsADirectoryError, name): load_cifar(folder)


def test_missing_empty_or_file(tmp_path, monkeypatch):
    with breaks(FileNotFoundError, 'nowhere is not there'): load_cifar(tmp_path/'nowhere')
    with breaks(FileNotFoundError, 'lacks data_batch_1, data_batch_2'): load_cifar(tmp_path)
    with breaks(NotADirectoryError, 'file'): load_cifar(put(tmp_path/'file', b'x'))
    put(tmp_path/CIFAR_FOLDER, b'x')
    with breaks(NotADirectoryError, CIFAR_FOLDER): load_cifar(tmp_path)
    monkeypatch.setenv('FISHNET_DATA', str(tmp_path/'gone'))
    with breaks(FileNotFoundError, 'FISHNET_DATA'): load_cifar()
    monkeypatch.delenv('FISHNET_DATA'); monkeypatch.chdir(tmp_path)
    with breaks(FileNotFoundError, 'fishnet-nb data --download'): load_cifar()
    with breaks(FileNotFoundError, "CIFAR10 is not there: give 'cifar10', 'shapes'"): CIFARDataModule('CIFAR10').setup()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
def test_a_pipe_does_not_hang(folder):
    (folder/'test_batch').unlink(); os.mkfifo(folder/'test_batch')
    with breaks(ValueError, 'ordinary file'): load_cifar(folder)


def test_a_huge_file_is_not_read(folder):
    os.truncate(folder/'test_batch', 2**40)
    with breaks(ValueError, 'at most'): load_cifar(folder)


def test_where_data_is_looked_for(folder, tmp_path, monkeypatch):
    assert find_data(folder) == find_data(tmp_path) == folder
    monkeypatch.setenv('FISHNET_DATA', str(tmp_path)); assert find_data() == folder
    monkeypatch.setenv('FISHNET_DATA', str(folder)); assert find_data() == folder
    monkeypatch.delenv('FISHNET_DATA')
    (tmp_path/'project'/'nbs').mkdir(parents=True); (tmp_path/'project'/'data').mkdir(); folder.rename(tmp_path/'project'/'data'/CIFAR_FOLDER)
    monkeypatch.chdir(tmp_path/'project'/'nbs')
    with pytest.raises(FileNotFoundError, match='^data/'): find_data()  # a folder above that isn't the project's
    (tmp_path/'project'/'settings.ini').touch()
    for cwd in ('project', 'project/nbs'):
        monkeypatch.chdir(tmp_path/cwd); assert find_data().resolve() == tmp_path/'project'/'data'/CIFAR_FOLDER


# ------------------------------------------------------------------ download

@pytest.fixture
def served(folder, tmp_path, monkeypatch):
    "A local web server that has the archive, packed as the official one is, in place of the official server."
    site = tmp_path/'site'; site.mkdir()
    file = site/Path(data.CIFAR_URL).name
    with tarfile.open(file, 'w:gz') as tar: tar.add(folder, CIFAR_FOLDER)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(data, 'CIFAR_URL', f'http://127.0.0.1:{server.server_port}/{file.name}')
    monkeypatch.setattr(data, 'CIFAR_MD5', hashlib.md5(file.read_bytes()).hexdigest())
    yield file
    server.shutdown(); server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def test_download(served, tmp_path, capfd):
    assert data.download_cifar(tmp_path/'new') == tmp_path/'new'/CIFAR_FOLDER
    assert '100%' in capfd.readouterr().err  # the progress bar
    assert os.listdir(tmp_path/'new') == [CIFAR_FOLDER] and len(load_cifar(tmp_path/'new').test_labels) == 10
    served.unlink(); data.download_cifar(tmp_path/'new')  # it is there: nothing is fetched
    (tmp_path/'new'/CIFAR_FOLDER/'data_batch_3').unlink()
    with pytest.raises(FileExistsError, match='lacks data_batch_3.*move .* away') as told: data.download_cifar(tmp_path/'new')
    assert '--download' not in str(told.value)


def test_download_that_fails_leaves_nothing(served, tmp_path, monkeypatch):
    served.write_bytes(served.read_bytes()[:-9] + b'x'*9)
    with pytest.raises(ValueError, match='MD5'): data.download_cifar(tmp_path/'new')
    served.unlink()
    with pytest.raises(ConnectionError, match='could not be fetched'): data.download_cifar(tmp_path/'new')
    assert os.listdir(tmp_path/'new') == []


# ------------------------------------------------------------------ shapes

def test_shapes_are_the_same_bytes_everywhere():
    found = hashlib.sha256()
    for part in make_shapes(200, seed=3): found.update(part.tobytes())
    assert found.hexdigest() == 'bb0b5add09d27f07bc423f91e6c9a01d7c109aba704c49946e3c616d9b23ccae'


def test_shapes_folder_is_written_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'data').mkdir()
    first = load_data('shapes'); stamp = (tmp_path/'data'/'shapes'/'test_batch').stat().st_mtime_ns
    load_data('shapes')
    assert os.listdir('data') == ['shapes'] and (tmp_path/'data'/'shapes'/'test_batch').stat().st_mtime_ns == stamp
    assert len(first.train_labels) == 5000 and len(first.test_labels) == 1000
    with pytest.raises(FileExistsError, match='shapes'): write_shapes('data/shapes')
    Path('data/shapes/data_batch_2').unlink()
    with pytest.raises(ValueError, match='lacks data_batch_2.*remove data/shapes to have it drawn anew') as told: load_data('shapes')
    assert '--download' not in str(told.value)
    shutil.rmtree('data/shapes'); write_shapes('data/shapes', 20, 10)
    with pytest.raises(ValueError, match='other shapes'): load_data('shapes')


def test_half_a_folder_or_a_wrong_one_is_not_replaced_by_shapes(tmp_path, monkeypatch):
    "Where data was given, its fault is said."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('FISHNET_DATA', raising=False)
    assert data.available_data() == 'shapes'
    (tmp_path/'data'/'cifar-10-batches-py').mkdir(parents=True)
    assert data.available_data() == 'cifar10'
    with pytest.raises(FileNotFoundError, match='lacks data_batch_1'): data.load_data('cifar10')
    monkeypatch.setenv('FISHNET_DATA', 'nowhere')
    assert data.available_data() == 'cifar10'


def test_import_is_quiet_and_offline():
    "No warning, and no call to the network, though albumentations would make one when imported."
    code = ('import socket, sys, warnings\nwarnings.simplefilter("error")\n'
            'def refuse(*args, **kwargs): print("network"); raise OSError\n'
            'socket.socket.connect = socket.getaddrinfo = refuse\nimport fishnet_nb.data')
    env = {key: value for key, value in os.environ.items() if key != 'NO_ALBUMENTATIONS_UPDATE'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


# ------------------------------------------------------------------ the same batches, whatever happens

class Watch(pl.LightningModule):
    "Trains next to nothing and writes down every batch it sees."
    def __init__(self):
        super().__init__()
        self.linear, self.seen = torch.nn.Linear(3*32*32, 10), []
    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, hashlib.sha256(batch['img'].numpy().tobytes()).hexdigest(), batch['label'].tolist()))
        return torch.nn.functional.cross_entropy(self.linear(batch['img'].flatten(1)), batch['label'])
    def validation_step(self, batch, _): pass
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches  # as schedules ask, which has Lightning begin to load before a resumed run knows its epoch
        return torch.optim.SGD(self.parameters(), 1e-3)


def watch(folder, epochs, workers=0, ckpt=None, callbacks=(), **how):
    "What a run of so many epochs sees, and its trainer."
    trainer = pl.Trainer(accelerator='cpu', max_epochs=epochs, logger=False, callbacks=list(callbacks), enable_checkpointing=bool(callbacks),
                         enable_progress_bar=False, enable_model_summary=False)
    model = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(model, datamodule=CIFARDataModule(str(folder), batch_size=5, num_workers=workers, **how), ckpt_path=ckpt)
    return model.seen, trainer


def test_workers_change_nothing(folder):
    whole, _ = watch(folder, 3)
    assert len({sha for _, sha, _ in whole}) == len(whole) == 24
    assert whole == watch(folder, 3, workers=2)[0]


@pytest.mark.parametrize('workers, how', [(0, {}), (2, {}), (0, dict(on_device=True, augment='standard', cutout_px=8))])
@pytest.mark.parametrize('saved', ('after validation', 'at the end of the epoch', 'after training'))
def test_resume_sees_what_an_unbroken_run_sees(folder, tmp_path, saved, workers, how):
    whole, _ = watch(folder, 4, workers, **how)
    keep = ModelCheckpoint(tmp_path, filename='kept', save_on_train_epoch_end=saved == 'at the end of the epoch')
    before, trainer = watch(folder, 2, workers, callbacks=[keep], **how)
    if saved == 'after training': trainer.save_checkpoint(tmp_path/'kept.ckpt')
    after, _ = watch(folder, 4, workers, ckpt=tmp_path/'kept.ckpt', **how)
    assert len({sha for _, sha, _ in whole}) == len(whole)
    assert [seen[1:] for seen in before + after] == [seen[1:] for seen in whole]


@pytest.mark.parametrize('augment, cutout_px', [(augment, px) for augment in data.AUGMENTATIONS for px in (0, 8)])
def test_batches_on_the_device_have_the_images_of_the_others(folder, augment, cutout_px):
    "For each rank, in training as in testing, the last batch included; and untouched images are the same to the bit."
    for rank in range(3):
        one, many = (CIFARDataModule(str(folder), batch_size=5, num_workers=0, augment=augment, cutout_px=cutout_px, on_device=on) for on in (False, True))
        for part in ('train', 'val', 'test'):
            loaders = [getattr(module, f'{part}_dataloader')() for module in (one, many)]
            for loader in loaders: loader.sampler.rank, loader.sampler.num_replicas, loader.sampler.epoch = rank, 3, 1
            batches, others = map(list, loaders)
            assert [batch['label'].tolist() for batch in batches] == [batch['label'].tolist() for batch in others] and batches
            for batch, other in zip(batches, others):
                assert batch['img'].shape == other['img'].shape and batch['img'].dtype == other['img'].dtype
                if part != 'train' or (augment, cutout_px) == ('none', 0): assert torch.equal(batch['img'], other['img'])


def test_an_image_on_the_device_depends_on_seed_epoch_and_index_alone():
    shapes = make_shapes(12)
    make = lambda seed: data.DeviceDataset(shapes.images, shapes.labels, 'student', 8, seed)
    one = make(1).__getitems__([(2, i) for i in range(12)])['img']
    torch.manual_seed(1); np.random.seed(1)
    two = make(1); two.__getitems__([(1, 0)])
    assert torch.allclose(make(1)[2, 3]['img'], one[3], atol=1e-6) and torch.equal(two[-1]['label'], two.labels[11]) and len([*two]) == 12
    for i in reversed(range(12)): assert torch.allclose(two.__getitems__([(2, i)])['img'][0], one[i], atol=1e-6)
    for other in (make(2), 2), (make(1), 3): assert not torch.equal(other[0].__getitems__([(other[1], i) for i in range(12)])['img'], one)
    assert torch.equal(two.images, torch.from_numpy(shapes.images))


@pytest.mark.parametrize('n', (1, 2, 9))
def test_each_image_has_its_name_below_it(n):
    ax, = data.check_images(make_shapes(n)).axes
    assert len(ax.texts) == n
    for text in ax.texts:
        x, y = text.get_position()
        assert 0 < x < ax.get_xlim()[1] and 0 < y < ax.get_ylim()[0]


@pytest.mark.parametrize('augment', ('student', 'standard'))
def test_what_comes_out_has_the_side_that_was_asked_for(augment):
    for given in (32, 64):
        for size in (16, 32, 64): assert train_transform(augment, size=size)(image=np.zeros((given, given, 3), np.uint8))['image'].shape == (3, size, size)


def test_images_that_a_device_can_not_augment_are_refused():
    images, labels = np.zeros((4, 3, 32, 32), np.uint8), np.arange(4)
    for wrong, message in ((images/255, labels), 'float64 array'), ((images[:, :1], labels), r'shape \(4, 1'), ((images, labels[:2]), '4 images and 2 labels'), ((images[:, :, :16], labels), '16×32 px'):
        with breaks(ValueError, message): data.DeviceDataset(*wrong)
    assert data.DeviceDataset(images, labels.tolist()).labels.dtype == torch.int64


@pytest.mark.parametrize('ranks', (1, 2, 3, 7))
@pytest.mark.parametrize('n', (7, 48, 50, 1017))
def test_ranks_share_the_images(n, ranks):
    for training in (False, True):
        shares, lengths = [], []
        for rank in range(ranks):
            sampler = EpochSampler(n, 8, training, seed=1)
            sampler.rank, sampler.num_replicas = rank, ranks
            sampler.set_epoch(4)
            shares.append(list(sampler)); lengths.append(len(sampler))
        if training: assert {epoch for share in shares for epoch, _ in share} == {4}
        seen = [at[1] if training else at for share in shares for at in share]
        assert [len(share) for share in shares] == lengths and len(set(seen)) == len(seen)
        if training: assert len(set(lengths)) == 1 and n - len(seen) < 2*ranks and (lengths[0] == 1 or lengths[0] % 8 != 1)
        else:
            size = data._even_batch_size(n, 8, ranks)
            assert sorted(seen) == list(range(n)) and len({-(-length//size) for length in lengths}) == 1


def test_a_sampler_that_was_made_before_the_processes_were_joined_gives_its_share(tmp_path, monkeypatch):
    loader = CIFARDataModule(str(write_shapes(tmp_path/'few', 20, 7)), val_fraction=0, num_workers=0, batch_size=4, augment='none').train_dataloader()
    assert len(loader) == 5
    for name, value in dict(is_initialized=True, get_world_size=2, get_rank=1).items(): monkeypatch.setattr(data.dist, name, lambda value=value: value)
    assert len(loader) == 3 and len([*loader.sampler]) == 10


def test_an_epoch_is_another_where_the_sampler_is_told(tmp_path):
    loader = CIFARDataModule(str(write_shapes(tmp_path/'few', 20, 7)), val_fraction=0, num_workers=0, batch_size=20).train_dataloader()
    epochs = []
    for epoch in (0, 0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append(next(iter(loader)))
    first, again, second = epochs
    assert torch.equal(first['img'], again['img']) and not torch.equal(first['label'], second['label'])


def test_labels_as_a_list_of_numpys_numbers_are_told_how_to_be_written(tmp_path):
    (tmp_path/'batch').write_bytes(pickle.dumps({b'labels': list(np.arange(3))}, protocol=4))
    with breaks(ValueError, r'by `\.tolist\(\)`'): unpickle(tmp_path/'batch')


def test_labels_are_whole_numbers_one_for_each_image():
    images = np.zeros((2, 3, 32, 32), np.uint8)
    assert CIFARDataset(images, np.zeros(2, np.int32))[0]['label'].dtype == torch.int64
    for make in CIFARDataset, data.DeviceDataset:
        for labels in (np.zeros((2, 1), np.int64), np.zeros(2)):
            with breaks(ValueError, 'whole numbers are expected'): make(images, labels)
    with breaks(TypeError, 'one of albumentations is expected'): CIFARDataset(images, np.zeros(2, np.int64), lambda image: image)


@pytest.mark.parametrize('wrong', [dict(batch_size=2.5), dict(batch_size='a'), dict(seed=1.5), dict(num_workers=1.5), dict(cutout_px=2.5), dict(cutout_px=33), dict(val_fraction='half')])
def test_numbers_of_the_data_module_are_checked(wrong):
    name, given = next(iter(wrong.items()))
    with breaks(ValueError, f'{name}={given!r}'): CIFARDataModule(**wrong)


def test_an_image_depends_on_seed_epoch_and_index_alone():
    shapes = make_shapes(6)
    make = lambda seed: CIFARDataset(shapes.images, shapes.labels, train_transform(), seed)
    one, two = make(1), make(1)
    forwards = {at: one[at]['img'] for at in [(e, i) for e in range(3) for i in range(6)]}
    for at in reversed(forwards):
        np.random.seed(at[1]); random.seed(at[0]); torch.manual_seed(at[0])
        assert torch.equal(forwards[at], two[at]['img'])
    assert not torch.equal(forwards[0, 1], forwards[1, 1]) and not torch.equal(forwards[0, 1], make(2)[0, 1]['img'])
    assert torch.equal(one[3]['img'], forwards[0, 3])


def test_without_a_seed_no_worker_and_no_epoch_repeats_another():
    shapes = make_shapes(1)
    dataset = CIFARDataset(np.repeat(shapes.images, 8, 0), np.repeat(shapes.labels, 8), train_transform())  # one image, eight times
    loader = torch.utils.data.DataLoader(dataset, 4, num_workers=2)
    drawn = torch.cat([batch['img'] for _ in range(2) for batch in loader])
    assert len({image.numpy().tobytes() for image in drawn}) == 16
    alike = []
    for _ in range(2):
        torch.manual_seed(5)
        alike.append(torch.stack([dataset[i]['img'] for i in range(4)]))
    assert torch.equal(*alike)


def test_transforms_draw_independently():
    "Seeded per image, two coins must not always fall alike."
    image = np.zeros((1, 3, 32, 32), np.uint8); image[:, :, 0, 0] = 255
    dataset = CIFARDataset(image, np.zeros(1, np.int64), A.Compose([A.HorizontalFlip(p=.5), A.VerticalFlip(p=.5), *data._to_tensor()]), seed=0)
    corners = [int(dataset[epoch, 0]['img'][0].argmax()) for epoch in range(200)]
    counts = [corners.count(at) for at in (0, 31, 31*32, 32*32 - 1)]
    assert sum(counts) == 200 and min(counts) > 30


@pytest.mark.parametrize('settings', [dict(batch_size=0), dict(val_fraction=1.), dict(val_fraction=-.1), dict(seed=-1), dict(num_workers=-1),
                                      dict(augment='strong'), dict(augment=True), dict(cutout_px=-1), dict(on_device=True, num_workers=2)])
def test_data_module_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))): CIFARDataModule('shapes', **settings)


def test_nothing_is_dropped_or_counted_twice(folder):
    module = CIFARDataModule(str(folder), batch_size=3, num_workers=0)
    module.setup()
    assert sum(len(b['label']) for b in module.val_dataloader()) == len(module.split[1])
    assert torch.cat([b['label'] for b in module.test_dataloader()]).tolist() == load_cifar(folder).test_labels.tolist()
    assert CIFARDataModule(str(folder), val_fraction=0).val_dataloader() == []
    with pytest.raises(ValueError, match='val_fraction'): CIFARDataModule(str(folder), val_fraction=.01).setup()


def test_seed_of_a_dataset_may_be_numpys():
    images = make_shapes(1)
    one, other = (CIFARDataset(images.images, images.labels, train_transform(), seed)[0]['img'] for seed in (1, np.int64(1)))
    assert torch.equal(one, other)
    for seed in -1, '1', 1.5:
        with pytest.raises(ValueError, match='seed=.*a whole number from 0 up'): CIFARDataset(images.images, images.labels, seed=seed)
