// Tells require.js, and the widgets for their fonts, that their code lies beside this script: no page asks another host.
{
  const here = document.currentScript.src.replace(/\/[^/]*$/, "");
  window.require.config({ paths: { anywidget: `${here}/anywidget`, "@jupyter-widgets/html-manager/dist": `${here}/html-manager/dist` } });
  window.__jupyter_widgets_assets_path__ = `${here}/html-manager/dist/`;
}
