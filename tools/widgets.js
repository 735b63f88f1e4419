// Tells require.js, and by it the widgets with their fonts, that their code lies beside this script: no page asks another host.
{
  const here = document.currentScript.src.replace(/\/[^/]*$/, "");
  window.require.config({
    paths: {
      anywidget: `${here}/anywidget`,
      "@jupyter-widgets/base": `${here}/html-manager/dist/base`,
      "@jupyter-widgets/controls": `${here}/html-manager/dist/controls`,
      "@jupyter-widgets/html-manager": `${here}/html-manager/dist/manager`,
      "@jupyter-widgets/html-manager/dist": `${here}/html-manager/dist`,
    },
  });
}
