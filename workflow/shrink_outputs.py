"""Makes the pictures saved in notebooks small: tissue as JPEG, drawings as PNG with a palette, at most 720 pixels wide."""
import base64
import io
import json
from pathlib import Path

from PIL import Image

for path in sorted((Path(__file__).parents[1]/'nbs').glob('*.ipynb')):
    nb = json.loads(path.read_text())
    shown = [o['data'] for c in nb['cells'] for o in c.get('outputs', []) if {'image/png', 'image/jpeg'} & set(o.get('data', {}))]
    for data in shown:
        picture = Image.open(io.BytesIO(base64.b64decode(next(data[k] for k in ('image/png', 'image/jpeg') if k in data))))
        if picture.mode == 'P' or picture.format == 'JPEG': continue      # small already; again would only blur it
        data.pop('image/png'); picture = picture.convert('RGB')
        picture.thumbnail((720, 720))
        drawing, photo = io.BytesIO(), io.BytesIO()
        picture.quantize(64).save(drawing, 'png', optimize=True)
        picture.save(photo, 'jpeg', quality=58, optimize=True)
        kind, small = ('jpeg', photo) if photo.tell() < .6*drawing.tell() else ('png', drawing)
        data[f'image/{kind}'] = base64.b64encode(small.getvalue()).decode()
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
