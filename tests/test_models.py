"What the pages can't show of the models: a compiler, another runtime, several processes."
import json
import os
import shutil
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.feature_extraction import create_feature_extractor

from fishnet_nb.bench import Setting, make_step
from fishnet_nb.blocks import init_weights, make_layer, reduce_channels
from fishnet_nb.channels import plan_channels
from fishnet_nb.data import check_images, find_data, stratified_split
from fishnet_nb.figures import draw_fish, draw_stage
from fishnet_nb.models import count_complexity, create_model, load_weights, named_stages, pretrained_path, read_weights, save_weights, stage_table
from fishnet_nb.shapes import make_shapes, write_shapes
from fishnet_nb.testing import Evaluation, evaluate, load_trained, plot_confusion, plot_predictions, test_run, top_k_errors
from fishnet_nb.training import Classifier, compile_problem, recipe_path
from fishnet_nb.versatility import ThreeHeads


def thin(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return create_model('fishnet73', **{'widths': (8, 16, 32, 64), **kwargs})


def listed(out: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]: return out if isinstance(out, list) else [out]


@pytest.mark.parametrize('name, features_only', [('fishnet73', False), ('fishnet73', True), ('resnet50', False)])
def test_onnx_gives_the_same_scores(tmp_path, name, features_only):
    import onnxruntime
    model, images = create_model(name, widths=(8, 16, 32, 64), features_only=features_only).eval(), torch.randn(2, 3, 32, 32)
    torch.onnx.export(model, (images,), tmp_path/'fish.onnx', dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch')},), verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/'fish.onnx')
    three = torch.randn(3, 3, 32, 32)
    for found, right in zip(session.run(None, {session.get_inputs()[0].name: three.numpy()}), listed(model(three)), strict=True):
        assert (torch.from_numpy(found) - right.detach()).norm() < 1e-4*right.norm()  # features aren't normalised, and rounding goes with their size


@pytest.mark.parametrize('features_only', [False, True])
def test_compiled_model_trains_alike(features_only):
    if problem := compile_problem(torch.device('cpu')): pytest.skip(problem)
    eager, compiled = (thin(widths=(8, 16), tail=(1, 1), features_only=features_only).double() for _ in range(2))
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)  # float64, so that what differs is the program and not the rounding
    found = [listed(model(images)) for model in (eager, torch.compile(compiled, fullgraph=True))]
    for out in found: sum(part.square().mean() for part in out).backward()
    torch.testing.assert_close(*found, atol=1e-8, rtol=1e-8)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True): torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6)


def test_inference_that_is_compiled_for_the_benchmark_has_its_batch_norms_folded():
    "Its weights are constants of the program, and no variance is left to take a root of."
    if problem := compile_problem(torch.device('cpu')): pytest.skip(problem)
    from torch._inductor.utils import run_and_get_code
    setting = Setting('compiled', channels_last=True, compiled=True)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for model, bf16, is_training in (block, False, True), (block, False, False), (thin(widths=(8, 16), tail=(1, 1)), True, False):
        step = make_step(model, torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), setting._replace(bf16=bf16), is_training)
        found = ''.join(run_and_get_code(step)[1])
        assert ('_frozen_param' in found, 'sqrt' in found) == (not is_training, is_training)
        with torch.compiler.set_stance('fail_on_recompile'): step()


def _train_step(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    models = [DistributedDataParallel(thin(**kwargs)) for kwargs in (dict(), dict(final_norm=True, features_only=True))]  # find_unused_parameters stays False
    for step in range(2):
        torch.manual_seed(2*step + rank)
        for model in models:
            sum(part.square().mean() for part in listed(model(torch.randn(2, 3, 32, 32)))).backward()  # the second pass fails if the first left parameters out
    torch.save([p.grad for model in models for p in model.parameters()], f'{folder}/{rank}.pt')
    if not rank: save_weights(models[0], f'{folder}/saved.safetensors', dict(arch='fishnet73', arch_args=dict(widths=[8, 16, 32, 64]), num_classes=10, in_channels=3))
    torch.distributed.destroy_process_group()


def test_two_ranks_without_unused_parameters(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(_train_step, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path/f'{rank}.pt') for rank in range(2))
    for a, b in zip(first, second, strict=True): torch.testing.assert_close(a, b)
    load_weights(tmp_path/'saved.safetensors')


def test_weights_in_the_package_err_no_more_than_they_say():
    "On real CIFAR-10, whichever is at hand; two points are left to chance, for the bit-exact subset has few images."
    try: find_data()
    except FileNotFoundError: pytest.skip('real CIFAR-10 is not there')
    found, _ = test_run()
    stated = read_weights(pretrained_path('fishnet73'))[1]['test']
    assert found.top1_error < stated['top1_error'] + .02 and found.top5_error < stated['top5_error'] + .01


def test_features_can_be_taken_out_by_torchvision():
    "By torch.fx, which passes something else than a tensor through the network."
    model, images = thin().eval(), torch.randn(2, 3, 32, 32)
    found = create_feature_extractor(model, {'head.stages.h4.refine.down': 'last', 'tail.stages.t2': 't2'})(images)
    torch.testing.assert_close(found['last'], model.forward_features(images)[-1])
    torch.testing.assert_close(found['t2'], model.tail.stages['t2'](model.tail.stages['t1'](model.tail.stem(images))))


@pytest.mark.parametrize('name', ['fishnet73', 'resnet50'])
def test_hooks_reach_every_stage_of_a_backbone(name):
    "As what wraps a stage does: checkpointing of activations, or sharding."
    backbone, seen = create_model(name, widths=(8, 16), tail=(1, 1), features_only=True), []
    stages = named_stages(backbone)
    for stage_name, stage in stages.items(): stage.register_forward_hook(lambda stage, given, found, stage_name=stage_name: seen.append(stage_name))
    features = backbone(torch.randn(1, 3, 8, 8))
    assert seen == list(stages) and [f.shape[1] for f in features] == list(backbone.feature_channels)
    assert stage_table(backbone, 8)[-1].out_channels == features[-1].shape[1]


def test_the_last_stage_is_drawn_without_a_pooling():
    stages = thin(widths=(8, 16), tail=(1, 1)).head.stages
    told = [''.join(text.get_text() for text in draw_stage(stages[name], 8).axes[0].texts) for name in ('h1', 'h2')]
    assert ['max-pool' in text for text in told] == [True, False] and 'to the classifier' in told[1]


def test_weights_begin_anew_where_a_model_had_no_memory():
    with torch.device('meta'): model = thin(widths=(8, 16), tail=(1, 1))
    model.to_empty(device='cpu')
    for tensor in model.state_dict().values(): tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    model.apply(init_weights).eval()
    plain = thin(widths=(8, 16), tail=(1, 1))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.state_dict().items() if 'running' in name or 'tracked' in name)
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_a_compiled_backbone_stays_compiled_below_its_heads():
    n_graphs = []
    def backend(graph, inputs): n_graphs.append(1); return graph.forward
    heads = ThreeHeads(torch.compile(thin(widths=(8, 16), tail=(1, 1), features_only=True), backend=backend), 10).eval()
    with torch.no_grad(): found = heads(torch.randn(2, 3, 8, 8))
    assert n_graphs and found.scores.shape == (2, 10)


def test_scores_that_were_evaluated_may_be_trained_on():
    "As a temperature is, which scales the confidences."
    found, temperature = evaluate(thin(widths=(8, 16), tail=(1, 1)), [dict(img=torch.randn(4, 3, 8, 8), label=torch.arange(4))]), torch.ones((), requires_grad=True)
    nn.functional.cross_entropy(found.logits/temperature, found.labels).backward()
    assert temperature.grad.isfinite()


def test_weights_that_name_no_classes_rightly_are_refused(tmp_path):
    "Names go to the terminal."
    about = dict(arch='fishnet73', arch_args=dict(widths=[8, 16], tail=[1, 1]), num_classes=2, in_channels=3)
    model = create_model('fishnet73', 2, widths=(8, 16), tail=(1, 1))
    with pytest.raises(ValueError, match='bad.safetensors is not written: about names 3 classes, and num_classes is 2'): save_weights(model, tmp_path/'bad.safetensors', about | dict(classes=['cat', 'dog', 'frog']))
    for classes in (['cat', '\x1b]0;title\x07'], 5, 'ab', [1, 2]):
        save_weights(model, tmp_path/'bad.safetensors', about | dict(classes=classes))
        with pytest.raises(ValueError, match='bad.safetensors is refused: what it names as classes'): load_trained(tmp_path/'bad.safetensors')
    save_weights(model, tmp_path/'told.safetensors', about | dict(arch_args=about['arch_args'] | dict(features_only=False)))
    assert len(load_weights(tmp_path/'told.safetensors', features_only=True)(torch.randn(1, 3, 8, 8))) == 2
    backbone = create_model('fishnet73', features_only=True, widths=(8, 16), tail=(1, 1))
    save_weights(backbone, tmp_path/'headless.safetensors', about | dict(arch_args=about['arch_args'] | dict(features_only=True)))
    with pytest.raises(ValueError, match='headless.safetensors holds no classifier'): load_trained(tmp_path/'headless.safetensors')


@pytest.mark.parametrize('wrong', [dict(num_classes=10**12), dict(arch_args=dict(widths=[10**7, 2*10**7], tail=[1, 1])), dict(arch_args=dict(widths=[8, 16], tail=[10**9, 1])), dict(arch_args=None), dict(arch='vgg')])
def test_weights_that_claim_another_network_take_no_memory_for_it(tmp_path, wrong):
    about = dict(arch='fishnet73', arch_args=dict(widths=[8, 16], tail=[1, 1]), num_classes=2, in_channels=3)
    model, path = create_model('fishnet73', 2, widths=(8, 16), tail=(1, 1)), tmp_path/'bad.safetensors'
    with pytest.raises(ValueError, match='bad.safetensors is not written'): save_weights(model, path, about | wrong)
    save_file(model.state_dict(), path, {'about': json.dumps(about | wrong)})
    with pytest.raises(ValueError, match='bad.safetensors does not'): load_weights(path)


def test_weights_are_saved_with_what_they_belong_to_or_not_at_all(tmp_path):
    "A mistake is told while the network is still there; what others have written is told apart."
    about, path = dict(arch='fishnet73', arch_args=dict(widths=[8, 16], tail=[1, 1]), num_classes=2, in_channels=3), tmp_path/'fish.safetensors'
    classifier = Classifier('fishnet73', about['arch_args'], num_classes=2)
    weights = {name: tensor.contiguous() for name, tensor in classifier.model.state_dict().items()}
    with pytest.raises(ValueError, match='this Classifier is no fishnet73.*give the network itself'): save_weights(classifier, path, about)
    with pytest.raises(ValueError, match='this FishNet is no fishnet73.*7 classes'): save_weights(classifier.model, path, about | dict(num_classes=7))
    stated = {key: value for key, value in about.items() if key != 'num_classes'}
    with pytest.raises(ValueError, match='about lacks num_classes'): save_weights(classifier.model, path, stated)
    assert not list(tmp_path.iterdir())
    backbone = create_model('fishnet73', features_only=True, **about['arch_args'])
    save_weights(backbone, path, stated | dict(arch_args=about['arch_args'] | dict(features_only=True)))
    assert load_weights(path).classifier is None
    save_file(weights, path, {'about': json.dumps(stated)})
    assert load_weights(path, features_only=True).classifier is None
    for num_classes in (None, 2, 7):
        with pytest.raises(ValueError, match="does not say which model its weights belong to.*num_classes"): load_weights(path, num_classes)
    save_file(weights, path)
    with pytest.raises(ValueError, match="lacks 'about'"): load_weights(path)
    torch.save(classifier.state_dict(), tmp_path/'fish.ckpt')
    with pytest.raises(ValueError, match='fish.ckpt is no .safetensors file.*load_classifier'): load_weights(tmp_path/'fish.ckpt')


def test_weights_that_name_no_classes_are_tested_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'data').mkdir()  # for the shapes
    about = dict(arch='fishnet73', arch_args=dict(widths=[8, 16], tail=[1, 1], features_only=False), num_classes=10, in_channels=3, data=dict(name='shapes'))
    model = create_model('fishnet73', widths=(8, 16), tail=(1, 1))
    assert len(test_run(save_weights(model, 'nameless.safetensors', about))[0].labels) == 1000
    save_weights(model, 'own.safetensors', about | dict(data=dict(name='own')))
    with pytest.raises(ValueError, match='neither CIFAR-10 nor the shapes'): test_run('own.safetensors')


def test_weights_in_the_package_that_were_damaged_are_refused(tmp_path, monkeypatch):
    shutil.copytree(pretrained_path('fishnet73').parent, tmp_path/'weights')
    monkeypatch.setattr('fishnet_nb.models.files', lambda package: tmp_path)
    create_model('fishnet73', pretrained=True)
    path = tmp_path/'weights'/'fishnet73.safetensors'
    whole = path.read_bytes()
    for raw in whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match='missing or damaged.*install the package again'): create_model('fishnet73', pretrained=True)


@pytest.mark.parametrize('error, call', [
    (ValueError, lambda: plan_channels((64, 128, 256, 512), k=3)), (ValueError, lambda: create_model('fishnet98')), (TypeError, lambda: create_model('resnet50', k=2)),
    (ValueError, lambda: create_model('fishnet99', pretrained=True)), (ValueError, lambda: create_model('fishnet73', features_only=True, final_norm='yes')),
    (ValueError, lambda: thin()(torch.zeros(1, 3, 30, 32))), (TypeError, lambda: thin()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))), (ValueError, lambda: reduce_channels(torch.zeros(1, 6, 1, 1), 4)),
    (ValueError, lambda: top_k_errors(torch.zeros(2, 4), torch.zeros(2))), (ValueError, lambda: top_k_errors(torch.zeros(2, 4), torch.zeros(2).long(), ks=(0,))), (ValueError, lambda: evaluate(thin(), [])), (TypeError, lambda: evaluate(thin(), [dict(img=torch.zeros(2, 3, 32, 32))])), (TypeError, lambda: evaluate(thin(features_only=True), [dict(img=torch.zeros(2, 3, 32, 32), label=torch.zeros(2).long())])),
    (ValueError, lambda: Classifier('fishnet73')(torch.zeros(3, 32, 32))), (TypeError, lambda: Classifier('fishnet73')(np.zeros((1, 3, 32, 32), np.float32))),
    (ValueError, lambda: top_k_errors(torch.zeros(2, 4), torch.zeros(2).long(), ks=5)), (ValueError, lambda: top_k_errors(torch.zeros(2, 4), torch.zeros(2).long(), ks=(1.5,))), (ValueError, lambda: count_complexity(thin(), 32)), (ValueError, lambda: count_complexity(thin(), (3, -8, 8))),
    (TypeError, lambda: evaluate(thin(), [dict(img=torch.zeros(2, 3, 32, 32, dtype=torch.uint8), label=torch.zeros(2).long())])), (ValueError, lambda: Classifier('fishnet73', label_smoothing=None)),
    (ValueError, lambda: Classifier('fishnet73', lr='fast')), (ValueError, lambda: Classifier('fishnet73', weight_decay=-1)), (ValueError, lambda: make_shapes(2.5)), (ValueError, lambda: write_shapes('nowhere', seed=-1)),
    (ValueError, lambda: draw_fish(create_model('resnet50', widths=(8, 16), tail=(1, 1)))), (ValueError, lambda: make_layer(8, 8, -1)), (ValueError, lambda: stratified_split(np.arange(4), 2, 0)),
    (ValueError, lambda: plot_confusion(Evaluation(torch.eye(4), torch.arange(4), 0., 0.), 'abc')), (ValueError, lambda: plot_predictions(Evaluation(torch.eye(4), torch.arange(4), 0., 0.), np.zeros((3, 3, 32, 32), np.uint8), 'abcd')), (ValueError, lambda: plot_predictions(Evaluation(torch.eye(4), torch.arange(4), 0., 0.), np.zeros((4, 3, 32, 32), np.uint8), 'abc')),
    (ValueError, lambda: make_shapes(0)), (ValueError, lambda: check_images(make_shapes(2), n=0)), (ValueError, lambda: check_images(np.zeros((0, 3, 32, 32), np.uint8))), (FileNotFoundError, lambda: load_weights('none.safetensors')), (FileNotFoundError, lambda: recipe_path('none.yaml'))])
def test_errors_are_of_the_type_that_is_documented(error, call):
    with pytest.raises(error): call()


def test_weights_in_the_package_want_their_own_network():
    "What it was made with may be given again, in a list too, but nothing else, nor a text that looks like it."
    arch_args = read_weights(pretrained_path('fishnet73'))[1]['arch_args']
    for widths in (arch_args['widths'], tuple(arch_args['widths']), np.array(arch_args['widths'])): create_model('fishnet73', pretrained=True, **arch_args | dict(widths=widths))
    for other in dict(widths=(64, 128)), dict(widths='64, 128, 256'), dict(widths=np.array([64, 128, 255])), dict(final_norm='True'), dict(final_norm=False), dict(in_channels=1):
        with pytest.raises(ValueError, match='the weights of fishnet73 belong to'): create_model('fishnet73', pretrained=True, **other)
    for name in ('False', '/a/file.safetensors'):
        with pytest.raises(ValueError, match='pretrained=.*True or False is expected'): create_model('fishnet73', pretrained=name)


def test_table_of_stages_leaves_each_part_in_its_mode():
    "Such as frozen statistics in a network that trains."
    model = thin().train()
    model.tail.eval()
    modes = [module.training for module in model.modules()]
    stage_table(model)
    assert modes == [module.training for module in model.modules()] and any(modes) and not all(modes)


CHANGES = dict(transfer_shortcut=True, repeat_shortcut=True, bridge=False)  # of the network, as the review proposes


def test_changed_network_is_the_same_fish(tmp_path):
    "The same channels, stages and layers; weights that come back; the memory format that training uses."
    plain, changed = thin(), thin(**CHANGES)
    assert changed.feature_channels == plain.feature_channels
    rows = stage_table(plain), stage_table(changed)
    assert [row.blocks for row in rows[0]] == [row.blocks for row in rows[1]]
    assert sum(row.layers for row in rows[0]) == sum(row.layers for row in rows[1]) + 2  # squeeze-and-excitation's
    save_weights(changed, tmp_path/'changed.safetensors', dict(arch='fishnet73', arch_args=dict(widths=[8, 16, 32, 64], **CHANGES), num_classes=10, in_channels=3))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_weights(tmp_path/'changed.safetensors').eval()(images), changed.eval()(images))
    features = changed.to(memory_format=torch.channels_last).tail(images.to(memory_format=torch.channels_last))
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)


def test_nothing_isolated_is_left_between_the_stem_and_the_classifier():
    "With all convolutions at zero, what the head's last feature sends back still reaches the stem's output, through tail, T, body and head."
    model = thin(**CHANGES)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and 'stem' not in name: nn.init.zeros_(module.weight)
    stem, *_ = features = model.tail(torch.randn(2, 3, 32, 32))
    joined, x = model.body(features)
    for out in features[-1], x, model.head(x, [stem, *joined[:0:-1], features[-2]])[-1]:
        gradient, = torch.autograd.grad(out.sum(), stem, retain_graph=True)
        assert (gradient.sum((2, 3)) > 0).all()  # of each channel


@pytest.mark.parametrize('kwargs', [dict(preact=False), CHANGES])
def test_any_stage_is_drawn(kwargs):
    from fishnet_nb.figures import draw_stage
    for stage in (thin(**kwargs).body.stages['b3'], thin(**kwargs).head.stages['h1']): draw_stage(stage, 8)


def test_drawing_leaves_the_model_as_it_is():
    "Its batch norms' statistics and its mode; also for an image of which the last stage keeps one pixel."
    from fishnet_nb.figures import draw_fish
    model = create_model('fishnet73', widths=(8, 16, 32, 64)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw_fish(model, 8)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_any_module_can_begin_anew():
    "An LSTM's bias is a switch."
    nn.Sequential(nn.LSTM(3, 3), nn.Linear(3, 3)).apply(init_weights)


def test_a_compiled_model_is_counted_as_it_is(): assert count_complexity(torch.compile(thin())) == count_complexity(thin())


def test_a_model_without_memory_is_counted_and_not_saved(tmp_path):
    with torch.device('meta'): shapes = thin()
    assert count_complexity(shapes) == count_complexity(thin()) and next(shapes.parameters()).is_meta
    with pytest.raises(ValueError, match='on the device meta, which has shapes only'): save_weights(shapes, tmp_path/'none.safetensors', dict(arch='fishnet73', arch_args={'widths': [8, 16, 32, 64]}, num_classes=10, in_channels=3))
    assert not any(tmp_path.iterdir())


def test_what_belongs_to_weights_is_plain(tmp_path):
    about = dict(arch='fishnet73', arch_args={'widths': [8, 16, 32, 64]}, num_classes=10, in_channels=3, error=np.float32(.1))
    with pytest.raises(ValueError, match='about holds what is no plain value .*float32'): save_weights(thin(), tmp_path/'none.safetensors', about)
    assert not any(tmp_path.iterdir())


def test_half_a_network_is_evaluated_in_its_own_precision():
    batches = [dict(img=torch.randn(4, 3, 8, 8), label=torch.arange(4))]
    model = thin(widths=(8, 16), tail=(1, 1))
    whole, half = evaluate(model, batches), evaluate(model.bfloat16(), batches)
    assert half.logits.dtype == torch.float32 and torch.allclose(whole.logits, half.logits, atol=.1*whole.logits.abs().max())


def test_stages_of_a_wrapped_model_and_of_no_model():
    model = create_model('fishnet73', widths=(8, 16), tail=(1, 1))
    assert stage_table(torch.compile(model)) == stage_table(model)
    with pytest.raises(TypeError, match='a FishNet or ResNet of this library is expected, not a Linear'): stage_table(torch.nn.Linear(2, 2))


def test_weights_have_the_name_by_which_they_are_loaded(tmp_path):
    about = dict(arch='fishnet73', arch_args=dict(widths=[8, 16], tail=[1, 1]), num_classes=10, in_channels=3)
    with pytest.raises(ValueError, match='is not the name of a .safetensors file'): save_weights(create_model('fishnet73', widths=(8, 16), tail=(1, 1)), tmp_path/'w.pt', about)
    assert not [*tmp_path.iterdir()]
