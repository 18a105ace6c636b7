"""Summaries: records without ids and dates, both texts on real records, the language model on a tiny Llama, its check, its cache, and what must not be logged."""
import glob
import gzip
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gemmgan_nb import summaries
from gemmgan_nb.data import write_cases, write_cohort
from gemmgan_nb.summaries import (HIDDEN, LABELS, NEUTRAL, ModelError, checkpoint_id, lexicon_of, llama_summaries, load_llama, messages_of,
                                  precision_here, record_of, summarise, tiny_llama, unsupported, whole_sentences, write_summaries, written)
from gemmgan_nb.workspace import Problems

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/'shared'/'data'/'tcga_clinical'/'gdc_cases_json'
CASE = dict(submitter_id='TCGA-XX-0001', case_id='c0ffee00-0000', disease_type='Squamous Cell Neoplasms', primary_site='Bronchus and lung', project=dict(project_id='TCGA-LUSC'),
            demographic=dict(gender='male', age_at_index=67, race='white', vital_status='Dead', days_to_death=371, year_of_birth=1941, updated_datetime='2019-01-01'),
            diagnoses=[dict(diagnosis_id='d1', primary_diagnosis='Squamous cell carcinoma, NOS', ajcc_pathologic_stage='Stage IIB', ajcc_pathologic_t='T2', age_at_diagnosis=24500,
                            year_of_diagnosis=2008, days_to_last_follow_up=300, progression_or_recurrence='yes', icd_10_code='C34.1',
                            treatments=[dict(treatment_id='t1', treatment_type='Radiation Therapy, NOS', treatment_or_therapy='no', treatment_outcome='Progressive Disease'),
                                        dict(treatment_type='Pharmaceutical Therapy, NOS', treatment_or_therapy='yes', therapeutic_agents='Cisplatin'),
                                        dict(treatment_type='Surgery', treatment_or_therapy='not reported')])],
            exposures=[dict(exposure_id='e1', pack_years_smoked=40.0)])
GOOD = ('This 67-year-old white man had a squamous cell carcinoma of the bronchus and lung, pathologic stage IIB and T2, received pharmaceutical therapy with cisplatin '
        'but no radiation therapy, and smoked 40 pack-years.')


@pytest.fixture(scope='module')
def real():
    files = sorted(glob.glob(str(REAL/'*.gz')))
    if not files: pytest.skip('no real clinical records here')
    return [c for f in files for c in json.load(gzip.open(f))['data']['hits']][::5]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory): return tiny_llama(tmp_path_factory.mktemp('llama')/'m')


@pytest.fixture(scope='module')
def llama(checkpoint): return load_llama(checkpoint=checkpoint, new_tokens=8)


class Scribe:
    "A model that says the same of everybody and counts what it was asked."
    id, batch, new_tokens = 'scribe', 2, 400
    def __init__(self, text=GOOD, ended=True): self.text, self.ended, self.asked = text, ended, []
    def prompt(self, messages): return json.dumps(messages)
    def fits(self, prompt): return True
    def __call__(self, prompts): self.asked += prompts; return [(self.text, self.ended)]*len(prompts)


def test_template_on_real_records(real):
    for case in real:
        text, bare = summarise(case), summarise(case, labels=False)
        assert len(text.split()) <= 200 and case['submitter_id'] not in text and not re.search(r'\b(dead|alive)\b|TCGA|not reported', text, re.I)
        assert not re.search(r'carcinoma|bladder|cervi|eso|pancrea|lung|kidney|tongue|\bC\d\d|\d{4}/\d', bare, re.I)
        assert text == summarise(json.loads(json.dumps(case)))


def test_records_hold_no_ids_dates_or_outcome(real):
    hidden = re.compile('|'.join(HIDDEN.values()))
    def keys(r): return [k for k, v in r.items() for k in (k, *keys(v))] if isinstance(r, dict) else [k for v in r for k in keys(v)] if isinstance(r, list) else []
    for case in real:
        full, blind = record_of(case), record_of(case, labels=False)
        assert not [k for k in keys(full) if hidden.search(k)] and set(keys(blind)) <= set(NEUTRAL.values())
        assert not re.search(r'TCGA|[0-9a-f]{8}-[0-9a-f]{4}|\b(dead|alive)\b|not reported', json.dumps(full), re.I)
        assert not re.search(r'carcinoma|bladder|cervi|eso[pf]|pancrea|lung|kidney|tongue|figo|ajcc|\bC\d\d|\d{4}/\d', json.dumps(blind), re.I)


def test_a_record():
    full = record_of(CASE)
    assert full['diagnoses'][0]['age_at_diagnosis'] == '67' and [t['treatment_type'] for t in full['diagnoses'][0]['treatments']] == ['Radiation Therapy', 'Pharmaceutical Therapy']
    assert not re.search(r'371|300|2008|1941|2019|c0ffee|d1|t1|e1|Dead|Progressive', json.dumps(full))
    assert record_of(CASE, outcome=True)['demographic']['vital_status'] == 'Dead'
    assert not any(k in json.dumps(record_of(CASE, labels=False)) for k in LABELS)
    assert record_of(dict(other={'ECOG': '1', 'HPV': 'unknown'}), labels=False) == dict(other={'ECOG': '1'})


def test_the_check_believes_the_template(real):
    "What the template says of a patient is in the record; what it says of another mostly is not."
    records, lexicon = [record_of(c) for c in real], lexicon_of(record_of(c) for c in real)
    texts = [summarise(c) for c in real]
    told = [(r, t) for r, t in zip(records, texts, strict=True) if t]
    assert not any(unsupported(t, r, lexicon) for r, t in told)
    assert sum(bool(unsupported(t, r, lexicon)) for (r, _), (_, t) in zip(told, told[231:] + told[:231], strict=True)) > .97*len(told)


@pytest.mark.parametrize('change, found', [
    (('67-year', '76-year'), '76'), (('67-year-old', 'seventy-year-old'), '70'), (('IIB', 'IIIB'), 'iiib'), (('T2', 'T3'), 't3'), (('squamous cell carcinoma', 'adenocarcinoma'), 'adenocarcinoma'),
    (('lung', 'breast'), 'breast'), (('cisplatin', 'docetaxel'), 'docetaxel'), (('man', 'woman'), 'woman'), (('but no radiation', 'and radiation'), 'radiation'), (('40', '20'), '20'),
    (('pack-years', 'pack-years and died'), 'died'), (('white man', 'asian man'), 'asian'), (('IIB', 'IIB (C50.9)'), 'c50.9')])
def test_the_check_catches(change, found):
    lexicon = lexicon_of([record_of(CASE), dict(a='Breast, Asian, Adenocarcinoma')])
    assert unsupported(GOOD, record_of(CASE), lexicon) == []
    assert found in unsupported(GOOD.replace(*change), record_of(CASE), lexicon)


def test_length():
    assert whole_sentences('A b c. D e f. G', 6, ended=False) == 'A b c. D e f.'
    assert whole_sentences('A b c. D e f. G h.', 6) == 'A b c. D e f.' and whole_sentences('a '*300) == '' and whole_sentences('') == ''


def test_the_models_own_notation(llama):
    "What the template of Llama 3 gives for a chat that waits for an answer; one start token, also once tokenized."
    prompt = llama.prompt([dict(role='system', content='S'), dict(role='user', content='U')])
    assert prompt == ('<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>'
                      '<|start_header_id|>assistant<|end_header_id|>\n\n')
    assert llama.tokenizer(prompt, add_special_tokens=False)['input_ids'].count(0) == 1 and llama.tokenizer.padding_side == 'left' and llama.ends == [1, 2]


def test_company_and_batches_do_not_matter(llama):
    prompts = [llama.prompt(messages_of(record_of(CASE), max_words=n)) for n in (5, 50)] + [llama.prompt([dict(role='user', content='U')])]
    assert llama(prompts) == [llama([p])[0] for p in prompts] == llama(prompts[::-1])[::-1]


def test_generation_equals_transformers_step_by_step(llama):
    "Greedy by hand: the most likely next token, again and again, on one unpadded prompt."
    import torch
    prompt = llama.prompt([dict(role='user', content='U')]); ids = llama.tokenizer(prompt, add_special_tokens=False, return_tensors='pt')['input_ids']; start = ids.shape[1]
    for _ in range(llama.new_tokens):
        with torch.inference_mode(): ids = torch.cat([ids, llama.network(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1].item() in llama.ends: break
    assert llama([prompt, prompt + 'x'*50])[0][0] == llama.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_babble_is_replaced_by_the_template(llama, tmp_path):
    told = llama_summaries(dict(a=CASE), llama, tmp_path)
    assert told['a']['by'] == 'template' and told['a']['text'] == summarise(CASE) and told['a']['reason']


def test_a_prompt_too_long_for_the_window(llama, tmp_path):
    long = CASE | dict(other={f'field {i}': 'word '*20 for i in range(120)})
    assert llama_summaries(dict(a=long), llama, tmp_path)['a']['reason'] == 'nothing asked' and not list(tmp_path.iterdir())


def test_each_text_is_written_once(tmp_path):
    cases = {str(i): json.loads(json.dumps(CASE)) | dict(submitter_id=str(i)) for i in range(3)}
    scribe = Scribe(); llama_summaries(cases, scribe, tmp_path)
    assert len(scribe.asked) == 1                                            # three patients with the same record
    cases['1']['exposures'][0]['pack_years_smoked'] = 41
    again = Scribe(); told = llama_summaries(cases, again, tmp_path)
    assert len(again.asked) == 1 and [t['by'] for t in told.values()] == ['llama', 'template', 'llama']       # 40 pack-years are no longer the truth of case 1
    other = Scribe(); other.id = 'scribe@2'; llama_summaries(cases, other, tmp_path)
    assert len(other.asked) == 2


def test_an_interrupted_run_goes_on(tmp_path):
    class Tired(Scribe):
        def __call__(self, prompts):
            if self.asked: raise KeyboardInterrupt
            return super().__call__(prompts)
    prompts, tired, fresh = list('abcde'), Tired(), Scribe()
    with pytest.raises(KeyboardInterrupt): written(tired, prompts, tmp_path)
    assert set(written(fresh, prompts, tmp_path)) == set(prompts) and len(tired.asked) == 2 and len(fresh.asked) == 3


def test_an_answer_that_was_cut_loses_its_last_sentence(tmp_path):
    told = llama_summaries(dict(a=CASE), Scribe(GOOD + ' The patient was then', ended=False), tmp_path)
    assert told['a']['text'] == GOOD and told['a']['by'] == 'llama'


def test_without_labels_nothing_is_guessed(tmp_path):
    scribe = Scribe(GOOD); told = llama_summaries(dict(a=CASE), scribe, tmp_path, labels=False)
    assert told['a'] == dict(text=summarise(CASE, labels=False), by='template', reason='not in the record')
    assert not re.search(r'lung|squamous|C34|Bronchus', scribe.asked[0]) and 'Do not name or guess' in scribe.asked[0]


def test_checkpoints_are_told_apart(checkpoint, llama, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path/'copy')
    assert checkpoint_id(copy) == checkpoint_id(checkpoint) and checkpoint_id(checkpoint) in llama.id and llama.id.endswith('float32')
    weights = bytearray((copy/'model.safetensors').read_bytes()); weights[-1] ^= 1; (copy/'model.safetensors').write_bytes(weights)
    assert checkpoint_id(copy) != checkpoint_id(checkpoint)


def test_four_bits_where_the_machine_allows(monkeypatch):
    assert precision_here('cpu') == ('float32', 'four bits need CUDA')
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda: True)
    monkeypatch.setattr(summaries.importlib.util, 'find_spec', lambda name: None)
    assert precision_here('cuda') == ('bfloat16', 'for four bits: pip install bitsandbytes accelerate')
    monkeypatch.setattr(summaries.importlib.util, 'find_spec', lambda name: name)
    assert precision_here('cuda') == ('nf4', '') and precision_here('cuda', four_bit=False)[0] == 'bfloat16'


def test_four_bits_as_transformers_gets_them(monkeypatch, checkpoint):
    from transformers import AutoModelForCausalLM
    asked = {}
    def load(place, **kind): asked.update(kind); raise OSError('no GPU here')
    monkeypatch.setattr(summaries, 'precision_here', lambda *_: ('nf4', '')); monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', load)
    with pytest.raises(ModelError, match='no GPU here'): load_llama(checkpoint=checkpoint, device='cuda')
    config = asked['quantization_config']
    assert config.load_in_4bit and config.bnb_4bit_quant_type == 'nf4' and config.bnb_4bit_use_double_quant and asked['device_map'] == {'': 'cuda'}


def test_a_model_that_cannot_be_had(monkeypatch, tmp_path, checkpoint):
    def refuse(*_, **__): raise OSError('no network in this test')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(ModelError, match='https://huggingface.co/ContactDoctor/Bio-Medical-Llama-3-8B.*HF_TOKEN.*hf download.*checkpoint.*template'): load_llama()
    with pytest.raises(ModelError, match='could not be loaded'): load_llama(checkpoint=tmp_path/'nosuch')
    monkeypatch.setattr(summaries.psutil, 'virtual_memory', lambda: type('M', (), dict(available=1000)))
    with pytest.raises(ModelError, match='Use a GPU'): load_llama(checkpoint=checkpoint)


def test_no_clinical_text_is_told(tmp_path, capfd, caplog):
    "Neither facts nor problems nor what is printed hold a word of a patient."
    problems = Problems()
    facts = write_summaries(tmp_path/'s.jsonl', dict(a=CASE, b=CASE | dict(demographic=dict(age_at_index=50))), Scribe(), problems)
    assert facts['by_model'] == 1 and facts['refused'] == {'not in the record': 1} and len(problems) == 1
    said = capfd.readouterr()
    assert not re.search(r'squamous|lung|67|cisplatin', f'{facts} {problems.rows} {said.out} {said.err} {caplog.text}', re.I)


def test_the_stage_shows_nothing_unasked(tmp_path, checkpoint):
    "The executed notebook of a run with the language model, as the engine leaves it."
    import numpy as np
    import pandas as pd
    obs = pd.DataFrame(dict(group=['a'], project='X', disease_type='D', primary_site='S', slide=['a'], split='train'), index=pd.Index(['a'], name='case_id'))
    write_cohort(tmp_path/'c', np.zeros((1, 2)), obs, pd.DataFrame(dict(symbol=['A', 'B']), index=['A', 'B']), 'log2(tpm+1)', ['text'], pd.DataFrame(columns=['slide', 'path', 'mpp']), [CASE])
    write_cases(tmp_path/'c'/'clinical.jsonl', [CASE])
    values = dict(cohort=str(tmp_path/'c'), out=str(tmp_path/'o'), writer='llama', checkpoint=str(checkpoint), device='cpu')
    call = [sys.executable, '-m', 'gemmgan_nb.reproduce', 'stage', str(ROOT/'nbs'/'09_summaries.ipynb'), str(tmp_path/'o'/'executed.ipynb'), json.dumps(values)]
    run = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((tmp_path/'o'/'summaries.jsonl').read_text())['text'] == summarise(CASE)
    shown = [c.get('outputs') for c in json.loads((tmp_path/'o'/'executed.ipynb').read_text())['cells']]
    left = json.dumps(shown) + ''.join((tmp_path/'o'/f).read_text() for f in ('provenance.json', 'problems.csv')) + run.stdout + run.stderr
    assert 'by_model' in left and not re.search(r'cisplatin|squamous|bronchus|TCGA-XX', left, re.I)


@pytest.mark.parametrize('labels', [True, False])
def test_a_later_diagnosis_tells_the_outcome_and_is_hidden_with_it(labels):
    later = dict(classification_of_tumor='recurrence', tumor_grade='G4', reason_treatment_ended='Death', initial_disease_status='Recurrent Disease', best_overall_response='PD')
    for case in (CASE | dict(diagnoses=[*CASE['diagnoses'], later]), CASE | dict(diagnoses=[later])):
        for said in (summarise(case, labels), json.dumps(record_of(case, labels))): assert not re.search('(?i)recurr|death|PD|G4' if len(case['diagnoses']) > 1 else '(?i)recurr|death|PD', said), said
        assert 'recurrence' in summarise(case, labels, outcome=True)
